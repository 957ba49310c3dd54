"""DAM's diagonal by gradient, from the closed form on, stopped where held-out tokens say so."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire import ops
from saltire.quant.lowrank.dam import dam_diagonal, mixing_rotation, rms_of_ranks
from saltire.quant.lowrank.truncation import Factors, Statistics
from saltire.quant.recipe import Recipe

STEPS, BATCH, CHECK_EVERY, PATIENCE = 60, 256, 10, 2
RATE = 0.02  # of log d
HELD_OUT = 0.25  # of the tokens


@dataclass(frozen=True)
class Learned:
    """diagonal: float64 [R]. losses: on held-out tokens, the squared error over the squared output,
    at the start (the closed form) and at every check; ``diagonal`` is the one with the least."""

    diagonal: Tensor
    losses: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.losses)


def learn_diagonal(
    x: Tensor, factors: Factors, statistics: Statistics, recipe: Recipe, seed: int = 0
) -> Learned:
    """Refine log d by gradient through both roundings (straight through).

    loss(d) = ‖Q(z·diag(d)·O)·Q(up·diag(1/d)·O)ᵀ - z·upᵀ‖² over the outputs' square, z = x·downᵀ, O
    the rotation of the ranks where the recipe's gauge has one. Tokens are split at random, three
    quarters to learn from. x: float32 [tokens, K].
    """
    assert recipe.low_rank is not None
    generator = torch.Generator().manual_seed(seed)
    z, up = x @ factors.down.float().T, factors.up.float()
    order = torch.randperm(len(z), generator=generator)
    held = order[: max(1, int(len(z) * HELD_OUT))][:1024]
    rest = order[max(1, int(len(z) * HELD_OUT)) :]
    rest = rest if len(rest) else held
    rotated = recipe.low_rank.gauge.endswith("hadamard")
    rotation = mixing_rotation(factors.rank).float() if rotated else None
    start = dam_diagonal(*rms_of_ranks(factors, statistics)).float().log()

    def loss(log_d: Tensor, tokens: Tensor) -> Tensor:
        a, b = tokens * log_d.exp(), up * (-log_d).exp()
        if rotation is not None:
            a, b = a @ rotation, b @ rotation
        rounded = _round_tokens(a, recipe.act_bits) @ _round_rows(b, recipe.weight_bits).T
        want = tokens @ up.T
        return (rounded - want).square().sum() / want.square().sum().clamp_min(1e-30)

    log_d = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([log_d], lr=RATE)
    best, losses, worse = start, [], 0
    with torch.no_grad():
        losses.append(float(loss(start, z[held])))
    for step in range(1, STEPS + 1):
        batch = rest[torch.randint(0, len(rest), (BATCH,), generator=generator)]
        with torch.enable_grad():
            value = loss(log_d, z[batch])
            (gradient,) = torch.autograd.grad(value, log_d)
        log_d.grad = gradient
        optimiser.step()
        if step % CHECK_EVERY == 0:
            with torch.no_grad():
                losses.append(float(loss(log_d, z[held])))
            if losses[-1] <= min(losses):
                best, worse = log_d.detach().clone(), 0
            else:
                worse += 1
                if worse == PATIENCE:
                    break
    return Learned(best.double().exp(), tuple(losses))


def _round_tokens(a: Tensor, bits: int) -> Tensor:
    codes, scale, _ = ops.transform_quantize(a.detach(), bits)
    return a + (codes.float() * scale[:, None] - a).detach()


def _round_rows(b: Tensor, bits: int) -> Tensor:
    """To nearest, over the range that GPTQ's grids end at on bell-shaped rows."""
    Q = 2 ** (bits - 1) - 0.5
    scale = b.detach().abs().amax(1, keepdim=True).clamp_min(1e-30) * 0.8 / Q
    codes = (b.detach() / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return b + (codes * scale - b).detach()
