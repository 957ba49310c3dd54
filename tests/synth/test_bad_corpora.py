"""Whole runs over corpora and tokenizers that lack something: counted, or refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from saltire.errors import SaltireError
from saltire.synth import synthesise
from saltire.synth.write import read_shard
from tests.synth.small_runs import WORDS, corpus, small
from tests.tiny import tiny_model, tiny_tokenizer

BROKEN = [b'{"text": "cut', b'{"text": "\xff\xfe"}', b'{"body": "x"}', b'{"text": null}']


def test_broken_rows_are_skipped_and_counted_and_change_nothing_else(tmp_path, scorer) -> None:
    good = corpus(tmp_path / "good.jsonl", 12).read_bytes().splitlines()
    lines = [*good[:5], *BROKEN, *good[5:]]
    (tmp_path / "bad.jsonl").write_bytes(b"\n".join(lines))
    facts = synthesise([str(tmp_path / "bad.jsonl")], tmp_path / "bad", small(scorer))
    assert facts["rows"] == facts["documents"] == 12
    assert facts["skipped"] == {
        "broken JSON": 1,
        "broken UTF-8": 1,
        "no field 'text'": 1,
        "text is no string": 1,
    }
    for line, (_, places) in enumerate(facts["skipped_places"].items(), 6):
        assert len(places) == 1
        assert f"bad.jsonl, line {line}" in places[0] or f"bad.jsonl, row {line}" in places[0]
    synthesise([str(tmp_path / "good.jsonl")], tmp_path / "good", small(scorer))
    shards = [p.name for p in sorted((tmp_path / "good/data").iterdir())]
    for name in shards:
        bad, fine = (read_shard(tmp_path / run / "data" / name) for run in ("bad", "good"))
        assert bad == fine


@pytest.mark.parametrize("line", BROKEN)
def test_a_strict_run_refuses_the_first_broken_row(tmp_path, scorer, line: bytes) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(SaltireError, match=r"in\.jsonl, (line|row) 2: .*--strict"):
        synthesise([str(path)], tmp_path / "out", small(scorer, strict=True))


def test_a_corpus_without_one_readable_row_names_the_first(tmp_path, scorer) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n".join(BROKEN[2:] * 3))
    with pytest.raises(SaltireError, match=r"no document could be read.*in\.jsonl, line 1"):
        synthesise([str(path)], tmp_path / "out", small(scorer))


@pytest.mark.parametrize("order", ["ordering", "path", "distance", "reversed", "neighbour"])
def test_one_document_is_a_sample_of_itself(tmp_path, scorer, order: str) -> None:
    path = corpus(tmp_path / "in.jsonl", 1)
    facts = synthesise([str(path)], tmp_path / "out", small(scorer, order=order))
    (sample,) = read_shard(tmp_path / "out/data/000000.parquet")
    assert (facts["documents"], facts["samples"], facts["edges"]) == (1, 1, 0)
    assert sample["text"] == json.loads(path.read_text())["text"]
    assert sample["order"] == [0]


def test_near_duplicates_are_dropped_but_for_the_first(tmp_path, scorer) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(WORDS.split(), k=50)) for _ in range(8)]
    copies = [text + " and" for text in texts[:3]]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*texts, *copies]))
    facts = synthesise([str(path)], tmp_path / "a", small(scorer, order="input"))
    assert (facts["documents"], facts["near_duplicates"]) == (8, 3)
    kept = small(scorer, order="input", near_duplicate=1.0)
    facts = synthesise([str(path)], tmp_path / "b", kept)
    assert (facts["documents"], facts["near_duplicates"]) == (11, 0)


@pytest.fixture(scope="module")
def scorer_without_eos(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("without_eos")
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=512)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.bos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_without_eos_does_for_every_separator_but_eos(
    tmp_path, scorer_without_eos
) -> None:
    source = str(corpus(tmp_path / "in.jsonl", 10))
    for k, separator in enumerate(("blank", "raw", "text: -- ")):
        config = small(scorer_without_eos, separator=separator)
        assert synthesise([source], tmp_path / str(k), config)["documents"] == 10
    with pytest.raises(SaltireError, match=r"no end-of-text token.*--separator blank"):
        synthesise([source], tmp_path / "eos", small(scorer_without_eos, separator="eos"))
