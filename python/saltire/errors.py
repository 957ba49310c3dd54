"""Errors that a user can act on."""

from __future__ import annotations


class SaltireError(ValueError):
    """Bad input: the message says what was expected, what came and what to do.

    The command line prints the message alone, without a traceback, and exits with 2.
    """


class MissingExtraError(SaltireError, ImportError):
    """An optional package is not installed; the message holds the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed. "
            f"Install it with: pip install 'saltire[{extra}]'"
        )
