"""Groups of related documents, and samples of groups, by growth on the neighbour graph.

The procedure, deterministic:

1. The seed of a sample is the unused document that fewest others have as a neighbour (ties: the
   earlier): outliers go first, while what little is near them is still free.
2. A group grows by the document whose cosines to the group's members sum highest (over edges of the
   neighbour graph in either direction), as long as it fits into the sample's tokens, until it has
   ``group_size`` documents or nothing near fits.
3. The next group of the sample starts with the best remaining document near the last group, or else
   with the next seed that fits; the sample is full when no seed among the next LOOK fits.

A document is used at most ``max_uses`` times, at most once a sample, and pairs above
``max_similarity`` are no neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOOK = 64  # seeds tried for the rest of a sample


@dataclass(frozen=True)
class Budget:
    """target: tokens of a sample. separator: tokens between two documents."""

    target: int
    separator: int
    group_size: int
    max_uses: int


class _Graph:
    """Neighbours in both directions: who[starts[i]:starts[i+1]] are near i, with their cosines."""

    def __init__(self, ids: NDArray[np.int64], cosines: NDArray[np.float32], most: float) -> None:
        source = np.repeat(np.arange(len(ids)), ids.shape[1])
        target, weight = ids.ravel(), cosines.ravel()
        good = (target >= 0) & (weight <= most) & (weight > 0)
        a, b, w = source[good], target[good], weight[good]
        pairs = np.stack([np.minimum(a, b), np.maximum(a, b)], 1)
        pairs, first = np.unique(pairs, axis=0, return_index=True)
        self.popularity = np.bincount(b, minlength=len(ids))
        a, b = np.r_[pairs[:, 0], pairs[:, 1]], np.r_[pairs[:, 1], pairs[:, 0]]
        order = np.lexsort((b, a))
        self.who = b[order]
        self.weight = np.r_[w[first], w[first]][order]
        self.starts = np.searchsorted(a[order], np.arange(len(ids) + 1))

    def near(self, i: int) -> Iterator[tuple[int, float]]:
        span = slice(self.starts[i], self.starts[i + 1])
        return zip(self.who[span].tolist(), self.weight[span].tolist(), strict=True)


def form_samples(
    ids: NDArray[np.int64],
    cosines: NDArray[np.float32],
    tokens: NDArray[np.int64],
    budget: Budget,
    max_similarity: float,
) -> Iterator[list[list[int]]]:
    """Yield samples, each a list of groups of document numbers in the order of growth.

    ids, cosines: [N, k] from ``nearest``. tokens: int64 [N], none above the target.
    """
    graph = _Graph(ids, cosines, max_similarity)
    seeds = np.lexsort((np.arange(len(tokens)), graph.popularity)).tolist()
    used = np.zeros(len(tokens), np.int64)
    started = 0  # seeds before this one have been used
    while True:
        while started < len(seeds) and used[seeds[started]] > 0:
            started += 1
        if started == len(seeds):
            return
        yield _sample(graph, seeds, started, used, tokens, budget)


def _sample(
    graph: _Graph,
    seeds: list[int],
    started: int,
    used: NDArray[np.int64],
    tokens: NDArray[np.int64],
    budget: Budget,
) -> list[list[int]]:
    room = budget.target
    inside: set[int] = set()
    groups: list[list[int]] = []
    affinity: dict[int, float] = {}

    def fits(i: int) -> bool:
        return int(tokens[i]) + (budget.separator if inside else 0) <= room

    def add(i: int) -> None:
        nonlocal room
        room -= int(tokens[i]) + (budget.separator if inside else 0)
        used[i] += 1
        inside.add(i)
        groups[-1].append(i)
        affinity.pop(i, None)
        for other, weight in graph.near(i):
            if other not in inside and used[other] < budget.max_uses:
                affinity[other] = affinity.get(other, 0.0) + weight

    def best_near() -> int | None:
        fitting = [(weight, -i) for i, weight in affinity.items() if fits(i)]
        return -max(fitting)[1] if fitting else None

    while True:
        start = best_near()
        if start is None:
            unused = (i for i in seeds[started:] if used[i] == 0 and i not in inside)
            tried = (i for _, i in zip(range(LOOK), unused, strict=False))
            start = next((i for i in tried if fits(i)), None)
        if start is None:
            return groups
        groups.append([])
        affinity.clear()
        add(start)
        while len(groups[-1]) < budget.group_size:
            following = best_near()
            if following is None:
                break
            add(following)
