"""BDQ's closed form: a diagonal for the input channels of a matrix, then a rotation.

Source: BDQ, section 3, with the transform made an exact equivalence (docs/bdq.md): tokens become
x·D⁻¹·R and weights Rᵀ·D·W, so that their product is unchanged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saltire.quant.recipe import Recipe
from saltire.reference.transform_quantize import hartley_matrix


def input_diagonal(rms_x: Tensor, rms_w: Tensor) -> Tensor:
    """``D_k = sqrt(rms x_k / rms w_k)``: the diagonal that minimises the rounding-noise proxy.

    Rounding noise of x·D⁻¹ meets the power of D·W and the other way round; Cauchy-Schwarz puts the
    least sum of both where each channel carries the same share, which is this D. Channels that are
    zero in x or in W keep D = 1; the geometric mean is 1, so scales stay in range.

    rms_x, rms_w: float [K]. Returns float64 [K], positive.
    """
    ratio = rms_x.double() / rms_w.double()
    alive = torch.isfinite(ratio) & (ratio > 0)
    log_d = torch.where(alive, ratio.clamp_min(1e-30).log() / 2, torch.zeros_like(ratio))
    if alive.any():
        log_d = torch.where(alive, log_d - log_d[alive].mean(), log_d)
    # One channel a thousand times apart from the rest is where f32 codes stop gaining.
    return log_d.clamp(-math.log(1e3), math.log(1e3)).exp()


def rotation(K: int, recipe: Recipe) -> tuple[int, Tensor | None]:
    """The Hadamard block and the left factor that rotate K channels under a recipe.

    ``full`` takes the largest power of two in K for the Hadamard and mixes the K / B blocks by a
    Hartley matrix; a Hadamard of more than 4,096 would cost more than it mixes.
    """
    if recipe.rotation == "none":
        return 1, None
    if recipe.rotation == "block":
        return math.gcd(recipe.block, K), None
    B = math.gcd(4096, K)
    A = K // B
    return B, hartley_matrix(A) if A > 1 else None
