"""Scores that survive a kill: one SQLite file, shared by the workers of a machine."""

from __future__ import annotations

import sqlite3
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from saltire.errors import SaltireError


class ScoreCache:
    """Arrays of f32 by 16-byte keys. Each ``put`` is whole or not there; the first one stays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            # A lost last score is computed again; a damaged file is not possible in WAL mode.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, crc INT, value BLOB)"
            )
        except sqlite3.Error as error:
            raise self._refusal(error) from None

    def get(self, key: bytes) -> NDArray[np.float32] | None:
        try:
            row = self._db.execute("SELECT crc, value FROM scores WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise self._refusal(error) from None
        if row is None or zlib.crc32(row[1]) != row[0]:
            return None
        return np.frombuffer(row[1], np.float32)

    def put(self, key: bytes, value: NDArray[np.float32]) -> None:
        data = value.tobytes()
        try:
            self._db.execute(
                "INSERT OR IGNORE INTO scores VALUES (?, ?, ?)", (key, zlib.crc32(data), data)
            )
        except sqlite3.Error as error:
            raise self._refusal(error) from None

    def close(self) -> None:
        self._db.close()

    def _refusal(self, error: sqlite3.Error) -> SaltireError:
        return SaltireError(
            f"cannot use the score cache {self._path}: {error}. Remove it or give another place."
        )
