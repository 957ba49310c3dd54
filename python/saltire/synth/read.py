"""Documents from jsonl (.gz, .zst), parquet, text files, folders of them and Hugging Face datasets.

What cannot be read is counted by kind, with the first places of each named, or refused (strict).
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from saltire.errors import MissingExtraError, SaltireError

MAX_LINE = 64 << 20  # bytes of one jsonl line or one text file: a document, not a corpus
PLACES_NAMED = 5
JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")
TEXT = (".txt", ".md", ".rst")


@dataclass
class Problems:
    """Rows that gave no document: how many of each kind, and where the first were."""

    strict: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, place: str, detail: str = "") -> None:
        if self.strict:
            raise SaltireError(
                f"{place}: {kind}{detail}. Mend it, or leave out --strict to skip and count it."
            )
        self.counts[kind] += 1
        places = self.places.setdefault(kind, [])
        if len(places) < PLACES_NAMED:
            places.append(place + detail)


def find_sources(inputs: Sequence[str]) -> list[str]:
    """Every file of the inputs, folders searched, in a fixed order; other names are datasets.

    Raises SaltireError for a path that is not there, a folder without a readable file, or a saved
    dataset of several splits.
    """
    if not inputs:
        raise SaltireError("no input was given; expected at least one file, folder or dataset.")
    sources: list[str] = []
    for name in inputs:
        path = Path(name)
        if (path / "dataset_dict.json").exists():
            sources.append(_only_split(path))
        elif path.is_dir() and not (path / "dataset_info.json").exists():
            files = sorted(p for p in path.rglob("*") if p.is_file() and _readable(p))
            if not files:
                raise SaltireError(
                    f"{name} holds no file that can be read: expected .jsonl, .jsonl.gz, "
                    ".jsonl.zst, .parquet, .txt, .md or .rst."
                )
            sources += map(str, files)
        elif path.is_file() and not _readable(path):
            raise SaltireError(
                f"{name} is of an unknown kind; expected .jsonl, .jsonl.gz, .jsonl.zst, .parquet, "
                ".txt, .md or .rst."
            )
        elif not path.exists() and (_readable(path) or name.startswith((".", "/", "~"))):
            raise SaltireError(f"there is no file or folder {name}.")
        else:
            sources.append(name)
    return sources


def describe_source(source: str) -> dict[str, Any]:
    """Name and size of a source, for the manifest and to notice a change when resuming."""
    path = Path(source)
    files = path.rglob("*") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files if file.is_file())
    return {"name": source, "bytes": size if path.exists() else None}


def read_documents(
    source: str, text_key: str, problems: Problems, skip: int = 0
) -> Iterator[tuple[int, str]]:
    """(row, text) of a source; rows count from 1. The first ``skip`` rows are passed over."""
    path = Path(source)
    if path.is_file():
        name = path.name.lower()
        if name.endswith(TEXT):
            rows: Iterator[tuple[int, Any]] = _text_file(path, problems)
        elif name.endswith(".parquet"):
            rows = _parquet(path, text_key, problems, skip)
        else:
            rows = _jsonl(path, text_key, problems, skip)
    else:
        rows = _dataset(source, text_key)
    for row, text in rows:
        if row <= skip:
            continue
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            problems.add("text is no string", f"{source}, row {row}", f" ({kind})")
        elif not text.strip():
            problems.add("empty text", f"{source}, row {row}")
        else:
            yield row, text


def _readable(path: Path) -> bool:
    return path.name.lower().endswith((*JSONL, *TEXT, ".parquet"))


def _only_split(path: Path) -> str:
    """The folder of the one split of a saved DatasetDict; SaltireError if there are others."""
    splits = sorted(p.parent for p in path.glob("*/dataset_info.json"))
    if not splits:
        raise SaltireError(f"{path} is a saved dataset without a split; save it again.")
    if len(splits) > 1:
        raise SaltireError(
            f"{path} is a saved dataset of {len(splits)} splits. Choose one by its folder: "
            f"{', '.join(map(str, splits))}."
        )
    return str(splits[0])


def _cannot_read(place: str, error: Exception) -> NoReturn:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    raise SaltireError(f"cannot read {place}: {reason}.") from None


def _text_file(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    if path.stat().st_size > MAX_LINE:
        problems.add("longer than 64 MB", str(path))
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.add("broken UTF-8", str(path), f" (byte {error.start})")
    except OSError as error:
        _cannot_read(str(path), error)
    else:
        yield 1, text


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import pyarrow
        except ImportError:
            raise MissingExtraError("pyarrow", "synth", f"reading {path}") from None
        # zstandard's reader takes a file that was cut off for one that ends; Arrow's refuses it.
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _jsonl(path: Path, text_key: str, problems: Problems, skip: int) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with _open(path) as file:
            while line := file.readline(MAX_LINE + 1):
                number += 1
                place = f"{path}, line {number}"
                if len(line) > MAX_LINE:
                    raise SaltireError(f"{place} is longer than 64 MB; expected one row a line.")
                if number <= skip or not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    problems.add("broken UTF-8", place, f" (byte {error.start})")
                except (json.JSONDecodeError, RecursionError) as error:
                    problems.add("broken JSON", place, f" ({getattr(error, 'msg', 'too deep')})")
                else:
                    if isinstance(row, dict) and text_key in row:
                        yield number, row[text_key]
                    else:
                        keys = ", ".join(list(row)[:6]) if isinstance(row, dict) else "no object"
                        problems.add(f"no field {text_key!r}", place, f" (has: {keys})")
    except (OSError, EOFError, zlib.error) as error:
        _cannot_read(f"{path} after line {number}", error)


def _parquet(path: Path, text_key: str, problems: Problems, skip: int) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "synth", f"reading {path}") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_key not in schema.names:
                raise SaltireError(
                    f"{path} has no column {text_key!r}; it has {', '.join(schema.names[:12])}. "
                    "Name it with --text-key."
                )
            found = schema.field(text_key).type
            kind = found.value_type if pyarrow.types.is_dictionary(found) else found
            if str(kind) not in ("string", "large_string", "string_view", "null"):
                raise SaltireError(
                    f"{path}: column {text_key!r} holds {found}; expected strings. Name another "
                    "with --text-key."
                )
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for value in batch.column(0):
                    number += 1
                    if number <= skip:
                        continue
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        place = f"{path}, row {number}"
                        problems.add("broken UTF-8", place, f" (byte {error.start})")
                    else:
                        yield number, text
    except (pyarrow.ArrowException, OSError) as error:
        _cannot_read(f"{path} after row {number}", error)


def _dataset(name: str, text_key: str) -> Iterator[tuple[int, Any]]:
    """``name``, ``name:configuration`` or ``name:configuration:split``, or a saved dataset."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "synth", f"{name!r} is no file; a dataset") from None
    try:
        if Path(name).is_dir():
            rows: Any = datasets.load_from_disk(name)
        else:
            repository, _, rest = name.partition(":")
            configuration, _, split = rest.partition(":")
            rows = datasets.load_dataset(
                repository, configuration or None, split=split or "train", streaming=True
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SaltireError(
            f"{name!r} is neither a file nor a dataset that can be loaded: {reason}"
        ) from None
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            if text_key not in row:
                raise SaltireError(
                    f"{name}, row {number}: no column {text_key!r}; it has {', '.join(row)}. "
                    "Name it with --text-key."
                )
            yield number, row[text_key]
    except SaltireError:
        raise
    except Exception as error:  # of whatever builder, file system or decoder is behind the name
        _cannot_read(f"{name} after row {number}", error)
