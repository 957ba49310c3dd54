"""Nearest neighbours of every document, by FAISS, from blocks of vectors on disk.

Up to FLAT documents the search is exact, block against block, with two blocks in memory. Beyond, an
IVF-PQ index is trained on a sample, written to disk and memory-mapped; its candidates are ranked
again by their true cosines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saltire.errors import MissingExtraError
from saltire.files import replacing_file

FLAT = 200_000  # documents: 200,000² · 384 multiply-adds are some minutes of two cores
TRAINING = 64  # vectors a centroid
CODE_BYTES = 48  # of a vector in the IVF-PQ index
PROBES = 32
WIDER = 4  # candidates ranked again, over the neighbours wanted


def block_file(folder: Path, block: int) -> Path:
    return folder / f"{block:06d}.npy"


def nearest(
    folder: Path, blocks: int, k: int, flat: int = FLAT
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k nearest other documents of each: numbers int64 [N, k] (-1: none) and cosines f32.

    folder: f32 [n, D] unit vectors in files of equal n, but for the last. Nearest first; equal
    cosines in rising number.
    """
    starts = np.cumsum([0, *(len(_load(folder, b)) for b in range(blocks))])
    wanted = min(k + 1, int(starts[-1]))
    if starts[-1] <= flat:
        ids, cosines = _flat(folder, starts, wanted)
    else:
        ids, cosines = _ivf(folder, starts, wanted)
    return _without_self(ids, cosines, k)


def _load(folder: Path, block: int) -> NDArray[np.float32]:
    array: NDArray[np.float32] = np.load(block_file(folder, block), mmap_mode="r")
    return array


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("faiss-cpu", "synth", "retrieval") from None
    return faiss


def _flat(
    folder: Path, starts: NDArray[np.int64], wanted: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    faiss = _faiss()
    ids = np.full((starts[-1], wanted), -1, np.int64)
    cosines = np.full((starts[-1], wanted), -np.inf, np.float32)
    for q in range(len(starts) - 1):
        queries = np.array(_load(folder, q))
        rows = slice(starts[q], starts[q + 1])
        for b in range(len(starts) - 1):
            vectors = np.array(_load(folder, b))
            near, which = faiss.knn(
                queries, vectors, min(wanted, len(vectors)), metric=faiss.METRIC_INNER_PRODUCT
            )
            ids[rows], cosines[rows] = _best(
                np.concatenate([ids[rows], which + starts[b]], axis=1),
                np.concatenate([cosines[rows], near], axis=1),
                wanted,
            )
    return ids, cosines


def _best(
    ids: NDArray[np.int64], cosines: NDArray[np.float32], wanted: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    order = np.lexsort((ids, -cosines), axis=1)[:, :wanted]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(cosines, order, 1)


def _ivf(
    folder: Path, starts: NDArray[np.int64], wanted: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    faiss = _faiss()
    count, blocks = int(starts[-1]), len(starts) - 1
    size = _load(folder, 0).shape[1]
    centroids = max(1, int(4 * count**0.5))
    path = folder / "index.faiss"
    if not path.exists():
        # "np": without the order of codes that only a search by Hamming distance reads; finding it
        # is an annealing of seconds a code byte, whatever the number of documents.
        index = faiss.index_factory(
            size, f"IVF{centroids},PQ{_code_bytes(size)}np", faiss.METRIC_INNER_PRODUCT
        )
        every = max(1, count // (TRAINING * centroids))
        sample = np.concatenate([np.array(_load(folder, b)[::every]) for b in range(blocks)])
        index.train(sample)
        for b in range(blocks):
            index.add(np.array(_load(folder, b)))
        with replacing_file(path) as temporary:
            faiss.write_index(index, str(temporary))
        del index
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    index.nprobe = min(PROBES, centroids)
    ids = np.full((count, wanted), -1, np.int64)
    cosines = np.full((count, wanted), -np.inf, np.float32)
    for q in range(blocks):
        queries = np.array(_load(folder, q))
        _, which = index.search(queries, min(WIDER * wanted, count))
        near = np.full(which.shape, -np.inf, np.float32)
        owner = np.searchsorted(starts, which, side="right") - 1
        for b in np.unique(owner[which >= 0]):
            vectors = _load(folder, int(b))
            row, column = np.nonzero((owner == b) & (which >= 0))
            found = vectors[which[row, column] - starts[b]]
            near[row, column] = np.einsum("nd,nd->n", queries[row], found)
        rows = slice(starts[q], starts[q + 1])
        ids[rows], cosines[rows] = _best(which, near, wanted)
    return ids, cosines


def _code_bytes(size: int) -> int:
    """The most bytes up to CODE_BYTES that divide a vector evenly."""
    return max(m for m in range(1, CODE_BYTES + 1) if size % m == 0)


def _without_self(
    ids: NDArray[np.int64], cosines: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    own = ids == np.arange(len(ids))[:, None]
    cosines = np.where(own | (ids < 0), -np.inf, cosines).astype(np.float32)
    ids = np.where(own, -1, ids)
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(ids, order, 1), np.take_along_axis(cosines, order, 1)
