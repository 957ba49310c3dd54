"""Near-duplicates by MinHash: bands of hashes propose pairs, true Jaccard overlap decides.

datasketch would do it, with some kilobytes of Python objects a document; arrays take 128 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from saltire.synth.store import DocumentStore

SHINGLE = 5  # tokens
BANDS, ROWS = 16, 4  # a pair of overlap 0.8 meets in a band with 1 - (1 - 0.8^4)^16 = 0.9998
_MIX = np.uint64(0x9E3779B97F4A7C15)


def shingles(tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Hashes of every run of 5 tokens, sorted and distinct; a shorter text is one shingle."""
    ids = tokens.astype(np.uint64)
    width = min(SHINGLE, len(ids))
    rows = len(ids) - width + 1
    value = np.zeros(rows, np.uint64)
    with np.errstate(over="ignore"):
        for k in range(width):
            value = (value ^ (ids[k : k + rows] + np.uint64(k + 1))) * _MIX
            value ^= value >> np.uint64(29)
    return np.unique(value)


def band_keys(tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """uint64 [BANDS]: two texts share a band's key if its ROWS smallest hashes are equal."""
    with np.errstate(over="ignore"):
        odd = (np.arange(1, BANDS * ROWS + 1, dtype=np.uint64) * _MIX) | np.uint64(1)
        hashed = shingles(tokens)[None, :] * odd[:, None]
        smallest = (hashed ^ (hashed >> np.uint64(31))).min(axis=1).reshape(BANDS, ROWS)
        key = np.zeros(BANDS, np.uint64)
        for row in range(ROWS):
            key = (key ^ smallest[:, row]) * _MIX
            key ^= key >> np.uint64(29)
    return key


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """|a ∩ b| / |a ∪ b| of two sorted arrays of distinct values."""
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / (len(a) + len(b) - both)


def keep_first(store: DocumentStore, threshold: float) -> NDArray[np.int64]:
    """Numbers of the documents to keep: of near-duplicates only the first.

    Documents that share a band are compared with the first of that band, so a cluster of m copies
    costs m comparisons. threshold 1 keeps all: exact copies are gone already.
    """
    count = len(store)
    if threshold >= 1 or count < 2:
        return np.arange(count)
    keys = _all_keys(store.all_tokens(), count)
    dropped = np.zeros(count, bool)
    for band in range(BANDS):
        order = np.argsort(keys[:, band], kind="stable")
        sorted_keys = keys[order, band]
        starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])
        ends = np.r_[starts[1:], count]
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            members = [int(m) for m in order[start:end] if not dropped[m]]
            if len(members) < 2:
                continue
            first = shingles(store.tokens(members[0]))
            for other in members[1:]:
                if jaccard(first, shingles(store.tokens(other))) >= threshold:
                    dropped[other] = True
    return np.flatnonzero(~dropped)


def _all_keys(texts: Iterable[NDArray[np.int64]], count: int) -> NDArray[np.uint64]:
    keys = np.empty((count, BANDS), np.uint64)
    for number, tokens in enumerate(texts):
        keys[number] = band_keys(tokens)
    return keys
