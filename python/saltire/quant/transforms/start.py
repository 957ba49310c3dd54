"""Where each transform of the family starts, from the statistics of an input and its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saltire.processes import sum_over_all, world_size
from saltire.quant.recipe import Recipe
from saltire.quant.transforms.closed_form import input_diagonal, rotation
from saltire.quant.transforms.transform import Transform
from saltire.reference.transform_quantize import hadamard_matrix, hartley_matrix

SMOOTH_ALPHA = 0.5  # SmoothQuant's migration strength
CHUNK = 2048  # tokens squared at once
KRONECKER_ALPHA = 0.3  # FlatQuant's, for the diagonal that it starts from


def starting_transform(x: Tensor, weight: Tensor, recipe: Recipe) -> Transform:
    """The transform of a recipe before anything is learned.

    smooth: max|x|^a / max|w|^(1-a), a = 0.5 (SmoothQuant). hadamard: a full rotation, or of blocks
    (QuaRot). kronecker: a weaker diagonal and two random rotations of about √K (FlatQuant's start).
    bdq: the diagonal of least noise, then a rotation. x: float32 [tokens, K]; weight: float32
    [N, K].
    """
    K = x.shape[1]
    ones = torch.ones(K)
    if recipe.transform == "none":
        return Transform(ones)
    if recipe.transform == "smooth":
        return Transform(_migration(x, weight, SMOOTH_ALPHA))
    if recipe.transform == "kronecker":
        A, B = kronecker_sizes(K)
        generator = torch.Generator().manual_seed(K)
        factors = [_random_rotation(size, generator) for size in (A, B)]
        return Transform(_migration(x, weight, KRONECKER_ALPHA), 1, *factors)
    how = _rotation(K, recipe)
    if recipe.transform == "hadamard":
        return Transform(ones, *how)
    rms_x, rms_w = channel_power(x).sqrt(), weight.square().mean(0).sqrt()
    return Transform(input_diagonal(rms_x, rms_w).float(), *how)


def _rotation(K: int, recipe: Recipe) -> tuple[int, Tensor | None, Tensor | None]:
    """The Hadamard size, left and right factor that a rotation starts from.

    One that will be learned has two dense factors of about √K, or one of ``block``: a fast Hadamard
    transform has nothing to learn.
    """
    hadamard, left = rotation(K, recipe)
    if recipe.learning is None or recipe.learning.group_steps == 0 or recipe.rotation == "none":
        return hadamard, None if left is None else left.float(), None
    A, B = kronecker_sizes(K) if recipe.rotation == "full" else (1, hadamard)
    return 1, None if A == 1 else _even_rotation(A), _even_rotation(B)


def _even_rotation(size: int) -> Tensor:
    power_of_two = size & (size - 1) == 0
    return (hadamard_matrix(size) if power_of_two else hartley_matrix(size)).float()


def kronecker_sizes(K: int) -> tuple[int, int]:
    """The two factors of K that are nearest to each other, the smaller first: 576 -> 24, 24."""
    A = next(a for a in range(math.isqrt(K), 0, -1) if K % a == 0)
    return A, K // A


def channel_power(x: Tensor) -> Tensor:
    """The mean square of each channel over the tokens of all processes, without a second copy of x.

    x: float [tokens, K], as many tokens in each process. Returns float [K].
    """
    sums = torch.stack([part.square().sum(0) for part in x.split(CHUNK)]).sum(0)
    return _over_all(sums / len(x))


def _over_all(statistic: Tensor) -> Tensor:
    """The mean over the processes, which each hold as many tokens."""
    return sum_over_all(statistic) / world_size()


def _migration(x: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """max|x|^alpha / max|w|^(1 - alpha), its geometric mean 1; 1 for channels that are zero."""
    peak_x, peak_w = _over_all(x.abs().amax(0)).double(), weight.abs().amax(0).double()
    log_d = alpha * peak_x.log() - (1 - alpha) * peak_w.log()
    alive = torch.isfinite(log_d)
    log_d = torch.where(alive, log_d, torch.zeros_like(log_d))
    if alive.any():
        log_d = torch.where(alive, log_d - log_d[alive].mean(), log_d)
    return log_d.clamp(-math.log(1e3), math.log(1e3)).exp().float()


def _random_rotation(size: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()
