"""Specification of the orders of ``sequence``: the objectives, and every order tried."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor


def ordering_value(
    w: Tensor, order: Sequence[int], length: Tensor | None = None, slope: float = 0.0
) -> float:
    """Σ_{a before b} W[a, b] · (1 + slope · d(a, b) / T).

    d(a, b): tokens of the documents between a and b; T: tokens of all. w: float [n, n]. length:
    float [n] tokens, None for equal ones. slope 0 is the linear ordering objective.
    """
    tokens = [1.0] * len(order) if length is None else [float(x) for x in length]
    total, value = sum(tokens), 0.0
    for i, a in enumerate(order):
        between = 0.0
        for b in order[i + 1 :]:
            value += float(w[a, b]) * (1 + slope * between / total)
            between += tokens[b]
    return value


def path_value(w: Tensor, order: Sequence[int]) -> float:
    """Σ_k W[order k, order k + 1]."""
    return sum(float(w[a, b]) for a, b in itertools.pairwise(order))


def brute_force(n: int, value: Callable[[tuple[int, ...]], float]) -> tuple[tuple[int, ...], float]:
    """The first best of all n! orders, and its value."""
    best = max(itertools.permutations(range(n)), key=value)
    return best, value(best)
