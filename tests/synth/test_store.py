"""Documents on disk: cut at characters, and the same after an interruption at any batch."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from saltire.synth import store
from saltire.synth.read import Problems
from saltire.synth.store import DocumentStore, document_id, ingest
from tests.tiny import tiny_tokenizer

SIGNS = "aß€𝄞"  # of one to four bytes, which are as many tokens


def take_in(sources: list[Path], folder: Path, tokenizer, most: int = 100, split: bool = False):
    """(counts, problems) of ``ingest``."""
    problems = Problems()
    names = [str(source) for source in sources]
    counts = ingest(
        names,
        folder,
        tokenizer,
        text_key="text",
        most_tokens=most,
        split=split,
        problems=problems,
    )
    return counts, problems


@pytest.mark.parametrize("most", [16, 17, 18, 19, 1000])
def test_cut_documents_give_the_text_again_when_joined(tmp_path: Path, most: int) -> None:
    signs = random.Random(0).choices(SIGNS, k=200)
    text = "".join(f"{k}{sign}" for k, sign in enumerate(signs))  # no two pieces alike
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    take_in([tmp_path / "a.txt"], tmp_path / "d", tokenizer, most, split=True)
    documents = DocumentStore(tmp_path / "d")
    pieces = [documents.text(n) for n in range(len(documents))]
    assert "".join(pieces) == text
    for number, piece in enumerate(pieces):
        ids = documents.tokens(number).tolist()
        assert ids == tokenizer(piece)["input_ids"]
        assert len(ids) <= most
        assert documents.id(number) == document_id(piece)


def test_reading_cut_off_at_any_batch_goes_on_to_the_same(tmp_path: Path, monkeypatch) -> None:
    """Segments of four documents, batches of two; broken rows are counted once, whatever is cut."""
    monkeypatch.setattr(store, "SEGMENT", 4)
    monkeypatch.setattr(store, "BATCH", 2)
    lines = [json.dumps({"text": f"line {k % 11}"}) if k % 5 else "{broken" for k in range(23)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = pyarrow.array([b"\xff" if k % 4 == 0 else b"row %d" % k for k in range(21)])
    rows = pyarrow.StringArray.from_buffers(21, *data.buffers()[1:])
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "b.parquet")
    sources = [tmp_path / "a.jsonl", tmp_path / "b.parquet"]
    tokenizer, calls = tiny_tokenizer(), 0

    def digests(folder: Path) -> dict[str, str]:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return {
            str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files
        }

    class Cut:
        """The tokenizer, interrupted at its call number ``at``."""

        def __init__(self, at: int) -> None:
            self.left = at

        def __call__(self, *arguments, **options):
            nonlocal calls
            calls += 1
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return tokenizer(*arguments, **options)

    whole = take_in(sources, tmp_path / "whole", Cut(-1))
    assert whole[1].counts == {"broken JSON": 5, "broken UTF-8": 6}
    for at in range(1, calls + 1):
        folder = tmp_path / f"cut-{at}"
        with pytest.raises(KeyboardInterrupt):
            take_in(sources, folder, Cut(at))
        assert take_in(sources, folder, Cut(-1)) == whole
        assert digests(folder) == digests(tmp_path / "whole")
