"""Which instruction set the CPU kernels use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from saltire.errors import SaltireError
from saltire.ops.library import _C

_forced = [""]  # the names of the `with` blocks that are open, innermost last

ISAS = ("ref", "avx2", "avx512")


def current_isa() -> str:
    """The instruction set in use: ``"ref"``, ``"avx2"`` or ``"avx512"``."""
    return _C.isa()


def best_isa() -> str:
    """The best instruction set that this processor and this build offer."""
    return _C.best_isa()


def isa_reason() -> str:
    """The instruction set in use and why, in one line for a person."""
    return _C.isa_reason()


@contextlib.contextmanager
def force_isa(name: str) -> Iterator[None]:
    """Use one instruction set inside a ``with`` block, for tests and benches.

    name: ``"ref"``, ``"avx2"`` or ``"avx512"``. Raises SaltireError if it is unknown or if the
    processor does not have it. Process-wide, not per thread.
    """
    previous = _forced[-1]
    try:
        _C.force_isa(name)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
        _C.force_isa(previous)
