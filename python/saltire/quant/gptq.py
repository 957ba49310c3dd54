"""Rounding of weights that makes up for its own error (GPTQ), for one matrix.

Source: Frantar et al., GPTQ (2022). Differs: the rounding of the activations is compensated as
well (``compensated_weight``), and grids are chosen under the same error that GPTQ minimises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.reference.lowbit_gemm import SYMMETRIC_ZERO

BLOCK = 64  # columns rounded before their error is applied to all later ones at once


@dataclass(frozen=True)
class Grid:
    """Levels ``scale · (code - zero)``: scale and zero float [N, groups]."""

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, w: Tensor, group: int) -> Tensor:
        """Nearest codes of one column: w [N] -> float [N] of integers in [0, 2**bits)."""
        scale = self.scale[:, group]
        return (w / scale + self.zero[:, group]).round().clamp_(0, 2**self.bits - 1)

    def values(self, codes: Tensor, group: int) -> Tensor:
        """What codes stand for: [N] -> [N]."""
        return (codes - self.zero[:, group]) * self.scale[:, group]


def choose_grid(
    w: Tensor,
    importance: Tensor,
    bits: int,
    group: int,
    zero_points: bool,
    scale_dtype: torch.dtype,
    candidates: int = 48,
) -> Grid:
    """The scales (and zeros) that lose least, by search over shrunken ranges.

    w: float [N, K]; importance: float [K], the power of each input. Returns scales rounded to
    ``scale_dtype``, so that codes are chosen for the scale that will be stored.
    """
    N, K = w.shape
    G = group or K
    top = 2**bits - 1
    blocks = w.reshape(N, K // G, G)
    weight = importance.reshape(K // G, G)
    if zero_points:
        low, high = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
        full = (high - low) / top
        middle = None
    else:
        middle = SYMMETRIC_ZERO[bits]
        full = blocks.abs().amax(-1) / (top - middle)
        low = torch.zeros_like(full)
    tiny = torch.finfo(scale_dtype).tiny
    best = torch.full_like(full, float("inf"))
    best_scale = full.clone()
    best_zero = torch.full_like(full, middle if middle is not None else 0.0)
    least = 0.25 if bits == 2 else 0.4  # 2-bit grids clip hard: their best range is far inside
    for step in range(candidates):
        shrink = 1.0 - (1.0 - least) * step / (candidates - 1)
        scale = (full * shrink).clamp_min(tiny).to(scale_dtype).to(w.dtype)
        zero = (-low * shrink / scale).round() if middle is None else best_zero.new_tensor(middle)
        zero = zero.expand_as(scale)
        codes = (blocks / scale[..., None] + zero[..., None]).round_().clamp_(0, top)
        error = ((codes - zero[..., None]) * scale[..., None] - blocks).square_()
        loss = (error * weight).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    # A group of zeros has scale 0: any positive scale represents it.
    best_scale = torch.where(best_scale > 0, best_scale, torch.ones_like(best_scale))
    return Grid(best_scale.to(scale_dtype).to(w.dtype), best_zero, bits)


def damped(H: Tensor, damping: float) -> Tensor:
    """H with ``damping`` times its mean diagonal added: float64 [K, K], positive definite."""
    H = H.double()
    mean = H.diagonal().mean()
    if not torch.isfinite(mean):
        raise SaltireError(
            "the calibration activations hold NaN or infinity. Check the model and the text."
        )
    floor = mean if mean > 0 else torch.ones_like(mean)
    return H + damping * floor * torch.eye(H.shape[0], dtype=H.dtype, device=H.device)


def compensated_weight(w: Tensor, H: Tensor, cross: Tensor, damping: float) -> Tensor:
    """The real-valued weight that best maps rounded inputs to the outputs of unrounded ones.

    Minimises ‖X̂·ŵ - X·w‖² + λ‖ŵ - w‖² over ŵ: ŵ = (H + λI)⁻¹ (X̂ᵀX + λI) w, with H = X̂ᵀX̂,
    cross = X̂ᵀX and λ = damping · mean diag H. w: [N, K]. Returns float64 [N, K].
    """
    ridge = damped(H, damping)
    shift = ridge.diagonal()[0] - H.double().diagonal()[0]
    target = cross.double() @ w.double().T + shift * w.double().T
    return torch.linalg.solve(ridge, target).T


def gptq(w: Tensor, H: Tensor, grid: Grid, group: int, damping: float = 0.01) -> Tensor:
    """Round w column by column, moving each column's error onto the columns not yet rounded.

    w: float [N, K]; H = X̂ᵀX̂ [K, K]. Columns go in order of falling power of their input, so that
    the largest errors find the most columns to be moved onto. Returns codes uint8 [N, K].
    """
    N, K = w.shape
    order = torch.argsort(H.diagonal(), descending=True)
    U = _inverse_factor(damped(H, damping)[order][:, order]).float()
    w = w[:, order].float().clone()
    groups = order // (group or K)
    codes = torch.empty(N, K, dtype=torch.uint8)
    grid = Grid(grid.scale.float(), grid.zero.float(), grid.bits)
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        block = w[:, start:stop].T.contiguous()  # columns as rows, so that each is contiguous
        errors = torch.empty_like(block)
        inner = U[start:stop, start:stop]
        for j in range(stop - start):
            g = int(groups[start + j])
            code = grid.codes(block[j], g)
            codes[:, order[start + j]] = code.to(torch.uint8)
            error = (block[j] - grid.values(code, g)) / inner[j, j]
            errors[j] = error
            if j + 1 < stop - start:
                block[j + 1 :] -= inner[j, j + 1 :, None] * error
        if stop < K:
            w[:, stop:] -= errors.T @ U[start:stop, stop:]
    return codes


def _inverse_factor(H: Tensor) -> Tensor:
    """Upper-triangular U with UᵀU = H⁻¹: float64 [K, K]."""
    lower = torch.linalg.cholesky(H)
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
