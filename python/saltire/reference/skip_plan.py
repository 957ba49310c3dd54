"""CLaSp's layer choice in plain torch: the specification, and brute force for small models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from torch import Tensor


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two vectors in float64; 0 where one of them is zero."""
    product = float(a.double().norm() * b.double().norm())
    return float(a.double() @ b.double()) / product if product > 0 else 0.0


def skip_plan_select(keep: Tensor, skip: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See ``saltire.ops.skip_plan_select``."""
    pairs = [(cosine(k, truth), cosine(s, truth)) for k, s in zip(keep, skip, strict=True)]
    kept = torch.tensor([k > s for k, s in pairs], dtype=torch.uint8)
    chosen = torch.where(kept.bool()[:, None], keep, skip)
    return chosen, kept, torch.tensor([max(pair) for pair in pairs])


def plan(
    layers: Sequence[Callable[[Tensor], Tensor]], states: Sequence[Tensor], most: int
) -> list[list[int]]:
    """The layers that the dynamic programme keeps, for 0, 1, ... ``most`` skipped ones.

    layers: functions of one state [D]. states: the whole model's, before the first layer and after
    each. One state g(i, j) for i layers seen and j of them skipped, found layer after layer.
    """
    L = len(layers)
    g: dict[tuple[int, int], tuple[Tensor, list[int]]] = {(0, 0): (states[0], [])}
    for i in range(1, L + 1):
        g[i, 0] = states[i], list(range(i))
        for j in range(1, min(i, most) + 1):
            skipped, kept_there = g[i - 1, j - 1]
            options = [(cosine(skipped, states[i]), skipped, kept_there)]
            if j < i:
                state, kept_here = g[i - 1, j]
                run = layers[i - 1](state)
                options.append((cosine(run, states[i]), run, [*kept_here, i - 1]))
            best = options[-1] if options[-1][0] > options[0][0] else options[0]
            g[i, j] = best[1:]
    return [g[L, j][1] for j in range(min(most, L) + 1)]


def brute_force(
    layers: Sequence[Callable[[Tensor], Tensor]], states: Sequence[Tensor], skipped: int
) -> tuple[list[int], float]:
    """The best of all ways to skip ``skipped`` layers: the layers kept, and the last cosine."""
    best: tuple[list[int], float] = ([], -2.0)
    for kept in combinations(range(len(layers)), len(layers) - skipped):
        state = states[0]
        for index in kept:
            state = layers[index](state)
        value = cosine(state, states[-1])
        if value > best[1]:
            best = (list(kept), value)
    return best
