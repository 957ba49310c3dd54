"""The log of a run: one JSON object a line, and TensorBoard where it is wanted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from saltire.errors import MissingExtraError, SaltireError
from saltire.files import replacing_file

LOG = "log.jsonl"


class Sink(Protocol):
    """Where records go besides the file."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take the record of one step."""

    def close(self) -> None:
        """Flush."""


class RunLog:
    """Appends records to ``folder/log.jsonl``, flushed line by line, so a kill costs no record.

    ``start`` is the first step that will be logged: on a resume, records of it and of later steps
    are dropped, since they will be made again.
    """

    def __init__(self, folder: Path, start: int = 0, tensorboard: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG
        if path.exists():
            kept = [record for record in read_log(path) if record["step"] < start]
            with replacing_file(path) as temporary:
                temporary.write_text("".join(_line(record) for record in kept))
        self._file = path.open("a", encoding="utf-8")
        self._sinks: list[Sink] = [_TensorBoard(folder, start)] if tensorboard else []

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it holds ``step``. Numbers that are not finite become null."""
        self._file.write(_line(record))
        self._file.flush()
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        """Close the file and what else is written to."""
        self._file.close()
        for sink in self._sinks:
            sink.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log. A last line that a kill cut off is left out; other damage is named."""
    records: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("it has no step")
        except ValueError as error:
            if number == len(lines):  # no newline after it: the write was cut off
                break
            raise SaltireError(f"{path}, line {number}: not a record ({error}).") from None
        records.append(record)
    return records


class _TensorBoard:
    def __init__(self, folder: Path, start: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "rl", "tensorboard: true") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite) + "\n"
