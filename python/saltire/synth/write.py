"""Samples to shards: parquet or zstd-compressed JSON lines, each file whole or not there.

Both have ``id``, ``text`` and further fields by name, so datatrove's readers take them as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saltire.errors import MissingExtraError, SaltireError
from saltire.files import replacing_directory, replacing_file

SUFFIX = {"parquet": "parquet", "dataset": "parquet", "jsonl.zst": "jsonl.zst"}


def shard_file(folder: Path, shard: int, form: str) -> Path:
    return folder / f"{shard:06d}.{SUFFIX[form]}"


def check_format(form: str) -> None:
    """Raise MissingExtraError unless the packages that the format needs are there."""
    try:
        if form == "jsonl.zst":
            import zstandard  # noqa: F401
        else:
            import pyarrow  # noqa: F401
        if form == "dataset":
            import datasets  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or form, "synth", f"writing {form}") from None


def write_shard(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write samples, all with the same fields, by the suffix of ``path``."""
    with replacing_file(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            table = pyarrow.Table.from_pylist(list(samples), schema=_schema())
            parquet.write_table(table, temporary, compression="zstd")
        else:
            import zstandard

            # Level 10 takes about 30 MB/s and saves a tenth over the default.
            with zstandard.open(temporary, "wb", zstandard.ZstdCompressor(level=10)) as file:
                for sample in samples:
                    file.write(json.dumps(sample, ensure_ascii=False).encode() + b"\n")


def read_shard(path: Path) -> list[dict[str, Any]]:
    """What ``write_shard`` wrote."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    import zstandard

    with zstandard.open(path, "rb") as file:
        return [json.loads(line) for line in file.read().decode().splitlines()]


def save_dataset(shards: Sequence[Path], out: Path, cache: Path) -> None:
    """Save all shards as one Hugging Face dataset, for ``datasets.load_from_disk``."""
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.Dataset.from_parquet([str(p) for p in shards], cache_dir=str(cache))
        with replacing_directory(out) as temporary:
            rows.save_to_disk(str(temporary))
    except OSError as error:
        raise SaltireError(f"cannot write the dataset {out}: {error}.") from None


def _schema() -> Any:
    import pyarrow as pa

    integers = pa.list_(pa.int64())
    edge = pa.struct(
        [
            ("source", pa.int32()),
            ("target", pa.int32()),
            ("nats", pa.float64()),
            ("std", pa.float64()),
        ]
    )
    return pa.schema(
        [
            ("id", pa.string()),
            ("text", pa.string()),
            ("tokens", pa.int64()),
            ("documents", pa.list_(pa.string())),
            ("starts", integers),
            ("ends", integers),
            ("token_starts", integers),
            ("token_ends", integers),
            ("order", integers),
            ("groups", integers),
            ("edges", pa.list_(edge)),
            ("objective", pa.float64()),
            ("bound", pa.float64()),
            ("gap", pa.float64()),
            ("exact", pa.bool_()),
        ]
    )
