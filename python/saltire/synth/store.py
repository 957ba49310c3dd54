"""Documents on disk: texts, token ids and an index, in segments that are whole or not there.

Memory is what the index takes, 40 bytes a document, whatever the texts weigh. A run that was cut
off goes on behind the last whole segment.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saltire.errors import SaltireError
from saltire.files import replacing_directory
from saltire.synth.read import Problems, read_documents

SEGMENT = 4096  # documents; a resumed run reads at most these again
BATCH = 256  # documents tokenised together
INDEX = np.dtype(
    [
        ("id", "S32"),  # hexadecimal
        ("text_start", "<u8"),
        ("text_bytes", "<u4"),
        ("token_start", "<u8"),
        ("tokens", "<u4"),
        ("source", "<u4"),
        ("row", "<u8"),
    ]
)


def document_id(text: str) -> str:
    """Name of a text by its content: 128 bits of BLAKE2b, 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class _Segment:
    """Collects documents of one segment, then writes it."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.tokens: list[NDArray[np.uint32]] = []
        self.rows: list[tuple[Any, ...]] = []
        self.text_bytes = self.token_count = 0

    def add(self, name: str, text: str, tokens: NDArray[np.uint32], source: int, row: int) -> None:
        data = text.encode("utf-8")
        self.rows.append(
            (name, self.text_bytes, len(data), self.token_count, len(tokens), source, row)
        )
        self.texts.append(data)
        self.tokens.append(tokens)
        self.text_bytes += len(data)
        self.token_count += len(tokens)

    def write(self, folder: Path, facts: dict[str, Any]) -> None:
        with replacing_directory(folder) as temporary:
            (temporary / "text.bin").write_bytes(b"".join(self.texts))
            tokens = np.concatenate(self.tokens) if self.tokens else np.zeros(0, np.uint32)
            tokens.astype("<u4").tofile(temporary / "tokens.bin")
            np.save(temporary / "index.npy", np.array(self.rows, INDEX))
            (temporary / "facts.json").write_text(json.dumps(facts))


def ingest(
    sources: Sequence[str],
    folder: Path,
    tokenizer: Any,
    *,
    text_key: str,
    most_tokens: int,
    split: bool,
    problems: Problems,
) -> dict[str, Any]:
    """Tokenise every document once into ``folder``; exact copies are dropped.

    most_tokens: longer documents are left out and counted, or cut at token boundaries if ``split``.
    Returns the counts. A segment's facts hold all counts up to its end, so that a later call goes
    on there.
    """
    done = _segments(folder)
    counts = {"rows": 0, "exact_duplicates": 0, "longer_than_target": 0, "cut": 0, "documents": 0}
    seen: set[bytes] = set()
    source, row = 0, 0
    if done:
        facts = json.loads((done[-1] / "facts.json").read_text())
        counts, source, row = facts["counts"], facts["source"], facts["row"]
        problems.counts.update(facts["problems"])
        problems.places.update(facts["places"])
        for path in done:
            seen.update(np.load(path / "index.npy")["id"].tolist())
        if facts["finished"]:
            return counts

    segment, number = _Segment(), len(done)

    def close(source: int, row: int, finished: bool) -> None:
        nonlocal segment, number
        counts["documents"] += len(segment.rows)
        facts = {
            "counts": counts,
            "source": source,
            "row": row,
            "finished": finished,
            "problems": dict(problems.counts),
            "places": problems.places,
        }
        segment.write(folder / f"{number:06d}", facts)
        segment, number = _Segment(), number + 1

    def add(batch: list[tuple[int, str]], source: int) -> None:
        encoded = tokenizer(
            [text for _, text in batch],
            add_special_tokens=False,
            return_offsets_mapping=split,
            verbose=False,
        )
        for k, (row, text) in enumerate(batch):
            counts["rows"] += 1
            ids = np.array(encoded["input_ids"][k], np.uint32)
            pieces = [(text, ids)]
            if len(ids) > most_tokens:
                if not split:
                    counts["longer_than_target"] += 1
                    continue
                counts["cut"] += 1
                pieces = _cut(text, ids, encoded["offset_mapping"][k], most_tokens)
            for piece, piece_ids in pieces:
                name = document_id(piece)
                if name.encode() in seen:
                    counts["exact_duplicates"] += 1
                elif len(piece_ids):
                    seen.add(name.encode())
                    segment.add(name, piece, piece_ids, source, row)

    for index in range(source, len(sources)):
        batch: list[tuple[int, str]] = []
        skip = row if index == source else 0
        for at, text in read_documents(sources[index], text_key, problems, skip):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                problems.add("broken UTF-8", f"{sources[index]}, row {at}", " (lone surrogate)")
                continue
            batch.append((at, text))
            if len(batch) == BATCH:
                add(batch, index)
                batch = []
                if len(segment.rows) >= SEGMENT:
                    close(index, at, False)
        if batch:
            add(batch, index)
    if not counts["rows"] and problems.counts:
        kind, places = next(iter(problems.places.items()))
        raise SaltireError(f"no document could be read. The first: {places[0]}: {kind}.")
    close(len(sources), 0, True)
    return counts


def _cut(
    text: str, ids: NDArray[np.uint32], offsets: Sequence[tuple[int, int]], most: int
) -> list[tuple[str, NDArray[np.uint32]]]:
    """Pieces of at most ``most`` tokens, whose texts are ``text`` again when joined.

    A cut never falls inside a character that is several tokens: it moves before that character.
    """
    pieces, start = [], 0
    while start < len(ids):
        end = min(start + most, len(ids))
        while start + 1 < end < len(ids) and offsets[end][0] < offsets[end - 1][1]:
            end -= 1
        first = offsets[start][0] if start else 0
        last = offsets[end][0] if end < len(ids) else len(text)
        pieces.append((text[first:last], ids[start:end]))
        start = end
    return pieces


def _segments(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("[0-9]*") if (p / "facts.json").exists())


class DocumentStore:
    """Random access to what ``ingest`` wrote. Documents have numbers 0..len-1."""

    def __init__(self, folder: Path) -> None:
        self._folders = [p for p in _segments(folder) if len(np.load(p / "index.npy"))]
        tables = [np.load(path / "index.npy") for path in self._folders]
        self.index = np.concatenate(tables) if tables else np.zeros(0, INDEX)
        self._ends = np.cumsum([len(table) for table in tables])

    def __len__(self) -> int:
        return len(self.index)

    def id(self, number: int) -> str:
        return self.index["id"][number].decode()

    def text(self, number: int) -> str:
        entry = self.index[number]
        with (self._folder(number) / "text.bin").open("rb") as file:
            file.seek(int(entry["text_start"]))
            return file.read(int(entry["text_bytes"])).decode("utf-8")

    def tokens(self, number: int) -> NDArray[np.int64]:
        entry = self.index[number]
        ids = np.fromfile(
            self._folder(number) / "tokens.bin",
            dtype="<u4",
            count=int(entry["tokens"]),
            offset=int(entry["token_start"]) * 4,
        )
        return ids.astype(np.int64)

    def all_tokens(self) -> Iterator[NDArray[np.int64]]:
        """The tokens of every document in turn, a segment in memory at a time."""
        start = 0
        for folder, end in zip(self._folders, self._ends, strict=True):
            ids = np.fromfile(folder / "tokens.bin", dtype="<u4").astype(np.int64)
            for entry in self.index[start:end]:
                first = int(entry["token_start"])
                yield ids[first : first + int(entry["tokens"])]
            start = int(end)

    def _folder(self, number: int) -> Path:
        return self._folders[int(np.searchsorted(self._ends, number, side="right"))]
