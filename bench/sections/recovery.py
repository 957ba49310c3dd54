"""How well an order of mixed sections gives back the articles: tau, adjacency, purity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000


@dataclass(frozen=True)
class Recovered:
    """One value an article: tau in [-1, 1]; adjacent and purity in [0, 1]."""

    tau: list[float]
    adjacent: list[float]
    purity: list[float]


def recovered(order: Sequence[int], article: Sequence[int], place: Sequence[int]) -> Recovered:
    """order: of documents 0..n-1. article, place: whose section each is, and its number there.

    tau: Kendall's, over the pairs of an article's sections. adjacent: share of its consecutive
    sections that stand next to one another, in the right direction. purity: the order is cut into
    runs as long as an article; the share of the article's sections in the run that has most.
    """
    at = {document: k for k, document in enumerate(order)}
    found = Recovered([], [], [])
    for name in sorted(set(article)):
        own = sorted((d for d in at if article[d] == name), key=lambda d: place[d])
        pairs = [1 if at[a] < at[b] else -1 for a, b in combinations(own, 2)]
        found.tau.append(float(np.mean(pairs)))
        steps = [at[b] == at[a] + 1 for a, b in pairwise(own)]
        found.adjacent.append(float(np.mean(steps)))
        runs = Counter(at[d] // len(own) for d in own)
        found.purity.append(max(runs.values()) / len(own))
    return found


def interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval over articles."""
    x = np.asarray(values)
    means = _resampled(x, seed).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(x.mean()), float(low), float(high)


def difference(ours: Sequence[float], other: Sequence[float], seed: int = 0) -> tuple[float, ...]:
    """Mean of paired differences and its 95% bootstrap interval."""
    return interval(np.asarray(ours) - np.asarray(other), seed)  # type: ignore[arg-type]


def _resampled(x: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    return x[np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))]
