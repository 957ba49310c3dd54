"""Activations on disk: memory-mapped files, so that a long calibration needs little memory."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from saltire.errors import SaltireError

FLOAT_BYTES = 4


class ActivationFile:
    """Batches of one shape in a memory-mapped file: float32 [batches, *shape].

    All of the file is reserved when it is made: a full disk is an error then, where a later write
    through the mapping would kill the process. ``release`` gives its pages back to the system.
    """

    def __init__(
        self,
        batches: int,
        shape: tuple[int, ...],
        where: Path | None = None,
        *,
        whole: bool = False,
    ) -> None:
        """where: a file to make or to go on with; without it a file that vanishes with the object,
        in the system's directory for such (TMPDIR). whole: the file must be there at its full size,
        as its values are needed. Raises SaltireError if it is not, or if the disk is full; a file
        that was there before is left alone then."""
        self.batches, self.shape = batches, shape
        size = max(1, batches * math.prod(shape)) * FLOAT_BYTES
        place = where or Path(tempfile.gettempdir())
        if where is not None and whole:
            _check_whole(where, size)
        made = where is not None and not where.exists()
        try:
            if where is None:
                file = tempfile.TemporaryFile(prefix="saltire-")  # noqa: SIM115 (the map keeps it)
            else:
                file = where.open("w+b" if made else "r+b")
            with file:
                os.posix_fallocate(file.fileno(), 0, size)
                self._map = mmap.mmap(file.fileno(), size)
        except OSError as error:
            if where is not None and made:
                where.unlink(missing_ok=True)
            raise SaltireError(
                f"cannot keep {size / 1e6:.0f} MB of activations in {place}: {error.strerror}. "
                "Free some space there, set TMPDIR to another disk, or calibrate on fewer tokens. "
                "Nothing that was written is lost."
            ) from error
        values = torch.frombuffer(self._map, dtype=torch.float32)
        self._values = values[: batches * math.prod(shape)].view(batches, *shape)

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, batch: int) -> Tensor:
        """A copy of one batch."""
        return self._values[batch].clone()

    def __setitem__(self, batch: int, value: Tensor) -> None:
        self._values[batch] = value
        self.release()

    def all(self) -> Tensor:
        """All batches, mapped and not copied: float32 [batches, *shape]."""
        return self._values

    def release(self) -> None:
        """Let the system have the pages back; they are read again when they are needed."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def flush(self) -> None:
        """Return once everything is on the disk."""
        self._map.flush()
        self.release()


def _check_whole(path: Path, size: int) -> None:
    found = f"{path.stat().st_size} bytes" if path.is_file() else "no file"
    if found != f"{size} bytes":
        raise SaltireError(
            f"cannot go on from the activations in {path}: expected {size} bytes, came {found}. "
            f"Remove {path.parent} and start again."
        )
