"""Writing without loss: everything goes to a temporary name first, then is renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from saltire.errors import SaltireError


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes ``path``'s place atomically.

    On any error the temporary file is removed and ``path`` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise SaltireError(_cannot_write(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory beside ``path``; on success it takes ``path``'s place.

    A directory cannot be replaced in one step: the old one is set aside, the new one renamed into
    place, and only then is the old one removed. A kill at any point leaves one whole directory at
    ``path`` or at ``path`` + ``.old``.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    aside = path.with_name(path.name + ".old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            if aside.exists():
                shutil.rmtree(aside)
            os.replace(path, aside)
        os.replace(temporary, path)
        if aside.exists():
            shutil.rmtree(aside)
    except OSError as error:
        raise SaltireError(_cannot_write(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _cannot_write(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return (
        f"cannot write {path}: {reason}. What was there before is unchanged. "
        "Free some space or choose another place."
    )
