"""Specification of ``transform_quantize``: rotate, round to a few bits per token, in pure torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def hadamard_matrix(size: int) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix, float64 [size, size]; size a power of two."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"size = {size} is not a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)], dim=0
        )
    return matrix / size**0.5


def hartley_matrix(size: int) -> Tensor:
    """The orthonormal Hartley matrix, cas(2π jk / A) / √A: float64 [A, A], symmetric.

    It mixes any number of blocks evenly (no entry above √(2/A)), where a Hadamard matrix exists
    only for some sizes.
    """
    index = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi / size * (index[:, None] * index[None, :] % size)
    return (angle.cos() + angle.sin()) / math.sqrt(size)


def transform(
    x: Tensor,
    diag: Tensor | None = None,
    hadamard: int = 1,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """Multiply each token by a diagonal, then rotate it.

    A token is seen as a matrix X [A, B], row-major, K = A·B::

        Y = leftᵀ · (X ∘ diag) · right

    with ``right`` dense [B, B] or the Hadamard matrix of size B = ``hadamard``, and ``left`` dense
    [A, A] or the identity. So a block Hadamard has only ``hadamard``; a full Hadamard of
    K = 9·64 has ``left`` = a 9 × 9 orthogonal matrix as well; Kronecker has both dense factors.

    x: float [M, K]. diag: float [K]. Returns float64 [M, K].
    """
    K = x.shape[-1]
    y = x.double()
    if diag is not None:
        y = y * diag.double()
    B = right.shape[0] if right is not None else hadamard
    y = y.reshape(*x.shape[:-1], K // B, B)
    if right is not None:
        y = y @ right.double()
    elif hadamard > 1:
        y = y @ hadamard_matrix(hadamard).to(y.device)
    if left is not None:
        y = left.double().T @ y
    return y.reshape(x.shape)


def quantize(
    y: Tensor, bits: int, clip: float = 1.0, sum_group: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Round each token symmetrically: ``code = clamp(round(y / scale), -Q, Q)``.

    ``Q = 2**(bits - 1) - 1`` and ``scale = clip * max|y| / Q``; ties go to the even code. A token
    of zeros (or below 1e-38) has scale 0 and codes 0. A token that holds a NaN or an infinity has
    scale NaN and codes 0, so that whatever is computed from it is NaN: marked, not silently wrong.

    y: float [M, K]. Returns codes int8 [M, K]; scale float32 [M]; sums int32 [M, K / sum_group],
    the sum of codes in each group of ``sum_group`` inputs (0: one group of K).
    """
    Q = 2 ** (bits - 1) - 1
    y = y.float()
    scale = y.abs().amax(dim=-1) * (clip / Q)
    bad = ~torch.isfinite(y).all(dim=-1)
    scale = torch.where(bad, torch.full_like(scale, float("nan")), scale)
    # Below the smallest normal number 1 / scale would overflow: such a token counts as zeros.
    usable = (scale >= torch.finfo(torch.float32).tiny) & ~bad
    scale = torch.where(usable | bad, scale, torch.zeros_like(scale))
    inverse = torch.where(usable, 1.0 / scale, torch.zeros_like(scale))
    codes = torch.where(bad[..., None], torch.zeros_like(y), y) * inverse[..., None]
    codes = codes.round().clamp(-Q, Q).to(torch.int8)
    group = sum_group or y.shape[-1]
    sums = codes.int().reshape(*y.shape[:-1], -1, group).sum(dim=-1, dtype=torch.int32)
    return codes, scale, sums


def transform_quantize(
    x: Tensor,
    bits: int,
    diag: Tensor | None = None,
    hadamard: int = 1,
    left: Tensor | None = None,
    right: Tensor | None = None,
    clip: float = 1.0,
    sum_group: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``quantize(transform(x))``; see both."""
    return quantize(transform(x, diag, hadamard, left, right), bits, clip, sum_group)
