"""The order of the documents of a group: by dependency, or one of the baselines."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from saltire.ops import Ordering, best_ordering, best_path
from saltire.synth.config import SynthConfig


def order_group(
    config: SynthConfig,
    tokens: NDArray[np.int64],
    similarity: NDArray[np.float64],
    gain: NDArray[np.float64] | None,
    seed: int,
) -> Ordering:
    """The places 0..n-1 of a group in the order that ``config.order`` asks for.

    tokens: int64 [n]. similarity: f64 [n, n] cosines. gain: f64 [n, n] nats, for the orders that
    need it. seed: of the shuffle and the search. An order without an objective has value and bound
    0. The places a group comes in are its order of growth, not ``input``: callers sort for that.
    """
    n = len(tokens)
    if config.order in ("ordering", "path", "distance", "reversed"):
        assert gain is not None
        w = torch.from_numpy(gain)
        if config.order == "path":
            return best_path(w, seed=seed)
        slope = config.slope if config.order == "distance" else 0.0
        best = best_ordering(w, length=torch.from_numpy(tokens), slope=slope, seed=seed)
        if config.order == "reversed":
            return Ordering(best.order[::-1], float(gain.sum()) - best.value, best.bound, False)
        return best
    if config.order == "shuffle":
        order = np.random.default_rng(seed).permutation(n)
    elif config.order == "length":
        order = np.argsort(-tokens, kind="stable")
    elif config.order == "neighbour":
        order = most_similar_next(similarity)
    else:
        order = np.arange(n)
    return Ordering([int(i) for i in order], 0.0, 0.0, False)


def most_similar_next(similarity: NDArray[np.float64]) -> NDArray[np.int64]:
    """ICLM's greedy walk: from the document least similar to the rest, always the most similar
    unvisited one."""
    n = len(similarity)
    near = similarity.copy()
    np.fill_diagonal(near, 0)
    order = [int(np.argmin(near.sum(1)))]
    free = np.ones(n, bool)
    free[order[0]] = False
    while len(order) < n:
        order.append(int(np.argmax(np.where(free, near[order[-1]], -np.inf))))
        free[order[-1]] = False
    return np.array(order)
