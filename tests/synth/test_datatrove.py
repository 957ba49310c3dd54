"""What a run writes is what datatrove's readers read: ``text``, ``id``, the rest as metadata."""

from __future__ import annotations

import json

import pytest

from saltire.synth import synthesise
from saltire.synth.write import read_shard
from tests.synth.small_runs import corpus, small

RESERVED = {"metadata", "media"}  # fields of a datatrove document that a reader fills otherwise


@pytest.fixture(scope="module", params=["parquet", "jsonl.zst"])
def run(request, tmp_path_factory, scorer):
    """(format, folder of the shards, the samples in them) of a run over several shards."""
    folder = tmp_path_factory.mktemp("run")
    config = small(scorer, format=request.param)
    synthesise([str(corpus(folder / "in.jsonl", 40))], folder / "out", config)
    data = folder / "out/data"
    return request.param, data, [s for p in sorted(data.iterdir()) for s in read_shard(p)]


def test_samples_have_what_a_document_needs_and_nothing_in_its_way(run) -> None:
    samples = run[2]
    assert all(isinstance(s["text"], str) and isinstance(s["id"], str) for s in samples)
    assert len({s["id"] for s in samples}) == len(samples)
    assert not RESERVED & set(samples[0])
    json.dumps(samples)  # datatrove's own writer must be able to write them again


def test_datatrove_reads_every_sample_with_its_fields(run) -> None:
    readers = pytest.importorskip("datatrove.pipeline.readers", reason="needs datatrove")
    form, data, samples = run
    if form == "parquet":
        reader = readers.ParquetReader(str(data), glob_pattern="*.parquet")
    else:
        reader = readers.JsonlReader(str(data), glob_pattern="*.jsonl.zst", compression="zstd")
    documents = list(reader.run())
    assert [(d.id, d.text) for d in documents] == [(s["id"], s["text"]) for s in samples]
    for document, sample in zip(documents, samples, strict=True):
        rest = {k: v for k, v in sample.items() if k not in ("id", "text")}
        assert {k: document.metadata[k] for k in rest} == rest
