"""Whole runs: what they write, that a killed run resumed equals one that was not, bad corpora."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from saltire.cli import build_app
from saltire.errors import SaltireError
from saltire.synth import synthesise
from saltire.synth.write import read_shard
from tests.synth.small_runs import corpus, digests, small
from tests.tiny import tiny_tokenizer

LONG = " ".join(f"long {i}" for i in range(150))


@pytest.mark.parametrize("form", ["parquet", "jsonl.zst", "dataset"])
def test_a_run_uses_every_document_once_within_the_target(tmp_path, scorer, form) -> None:
    source = corpus(tmp_path / "in.jsonl", 40)
    facts = synthesise([str(source)], tmp_path / "out", small(scorer, format=form))
    samples = [s for p in sorted((tmp_path / "out/data").iterdir()) for s in read_shard(p)]
    assert len(samples) == facts["samples"] > 3
    names = [name for sample in samples for name in sample["documents"]]
    assert len(names) == len(set(names)) == facts["documents"]
    rows = {json.loads(line)["text"] for line in source.read_text().splitlines()}
    for sample in samples:
        assert sample["tokens"] == len(tiny_tokenizer()(sample["text"])["input_ids"]) <= 400
        for start, end in zip(sample["starts"], sample["ends"], strict=True):
            assert sample["text"][start:end] in rows
        assert sample["objective"] <= sample["bound"] + 1e-6
        assert sample["edges"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    for file in manifest["files"]:
        data = (tmp_path / "out" / file["name"]).read_bytes()
        assert hashlib.sha256(data).hexdigest() == file["sha256"]
    if form == "dataset":
        import datasets

        assert len(datasets.load_from_disk(str(tmp_path / "out/dataset"))) == len(samples)


def test_two_workers_write_what_one_writes(tmp_path, scorer) -> None:
    source = str(corpus(tmp_path / "in.jsonl", 40))
    synthesise([source], tmp_path / "one", small(scorer))
    synthesise([source], tmp_path / "two", small(scorer), workers=2)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


RUN = """
import sys
from saltire.synth import SynthConfig, synthesise
import json
synthesise([sys.argv[1]], sys.argv[2], SynthConfig(**json.loads(sys.argv[3])), resume=True)
"""


def test_a_run_killed_at_random_points_equals_an_uninterrupted_one(tmp_path, scorer) -> None:
    source = str(corpus(tmp_path / "in.jsonl", 60))
    config = small(scorer, samples_per_shard=1)
    synthesise([source], tmp_path / "whole", config)
    out = tmp_path / "killed"
    command = [sys.executable, "-c", RUN, source, str(out), json.dumps(config.to_json())]
    kills, rng = 0, random.Random(1)
    for _ in range(8):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not (out / ".work").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.5))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        if (out / "manifest.json").exists():
            break
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert kills > 0
    assert digests(out) == digests(tmp_path / "whole")


def test_resuming_with_other_settings_is_refused_by_name(tmp_path, scorer) -> None:
    source = str(corpus(tmp_path / "in.jsonl", 20))
    synthesise([source], tmp_path / "out", small(scorer, order="input"))
    with pytest.raises(SaltireError, match="--resume"):
        synthesise([source], tmp_path / "out", small(scorer, order="input"))
    with pytest.raises(SaltireError, match='order was "input", now "length"'):
        synthesise([source], tmp_path / "out", small(scorer, order="length"), resume=True)
    again = synthesise([source], tmp_path / "out", small(scorer, order="input"), resume=True)
    assert again["resumed"]


def test_duplicates_are_dropped_and_counted(tmp_path, scorer) -> None:
    path = corpus(tmp_path / "in.jsonl", 12)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines + lines[:4]))
    facts = synthesise([str(path)], tmp_path / "out", small(scorer, order="input"))
    assert facts["exact_duplicates"] == 4
    path.write_text("\n".join([lines[0]] * 9))
    facts = synthesise([str(path)], tmp_path / "same", small(scorer))
    assert (facts["documents"], facts["exact_duplicates"]) == (1, 8)


def test_documents_longer_than_the_target_are_left_out_or_cut(tmp_path, scorer) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"text": LONG}) + "\n" + json.dumps({"text": "short one"}))
    facts = synthesise([str(path)], tmp_path / "a", small(scorer, order="input"))
    assert (facts["documents"], facts["longer_than_target"]) == (1, 1)
    facts = synthesise([str(path)], tmp_path / "b", small(scorer, order="input", split=True))
    assert facts["cut"] == 1
    assert facts["tokens"] >= 1000
    path.write_text(json.dumps({"text": LONG}))
    with pytest.raises(SaltireError, match="--split"):
        synthesise([str(path)], tmp_path / "c", small(scorer, order="input"))


def test_an_empty_corpus_and_an_unwritable_output_are_refused(tmp_path, scorer) -> None:
    (tmp_path / "in.jsonl").write_text("")
    with pytest.raises(SaltireError, match="no documents"):
        synthesise([str(tmp_path / "in.jsonl")], tmp_path / "a", small(scorer))
    with pytest.raises(SaltireError, match="cannot use"):
        synthesise([str(tmp_path / "in.jsonl")], tmp_path / "in.jsonl" / "b", small(scorer))


def test_the_verb_writes_samples_and_a_page(tmp_path, scorer) -> None:
    source = str(corpus(tmp_path / "in.jsonl", 20))
    options = ["--target-tokens", "400", "--encoder", "lexical", "--group-size", "5"]
    command = ["synth", source, str(tmp_path / "out"), "--scorer", scorer, *options, "--json"]
    done = CliRunner().invoke(build_app(), command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["documents"] == 20
    page = (tmp_path / "out/index.html").read_text()
    assert "<svg" in page or "data:image" in page
    assert "<script" not in page
    missing = CliRunner().invoke(build_app(), ["synth", "none.jsonl", str(tmp_path / "x")])
    assert missing.exit_code == 1
    assert isinstance(missing.exception, SaltireError)
    assert "none.jsonl" in str(missing.exception)
