"""Rounding of weights that makes up for its own error (GPTQ), for one matrix.

Source: Frantar et al., GPTQ (2022). Differs: the statistics are those of the rounded activations,
and grids are chosen under the error that GPTQ minimises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.quant.finite import all_finite
from saltire.reference.lowbit_gemm import SYMMETRIC_ZERO

COARSE, FINE = 13, 4  # ranges of a grid that are tried, and steps to the next on either side
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
) -> Grid:
    """The scales (and zeros) that lose least, by search over shrunken ranges: coarse, then fine.

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
    best_shrink = torch.ones_like(full)

    def consider(shrink: Tensor) -> None:
        scale = (full * shrink).clamp_min(tiny).to(scale_dtype).to(w.dtype)
        zero = (-low * shrink / scale).round() if middle is None else best_zero.new_tensor(middle)
        zero = zero.expand_as(scale)
        codes = (blocks / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, top)
        error = codes.sub_(zero[..., None]).mul_(scale[..., None]).sub_(blocks).square_()
        loss = torch.einsum("ngk,gk->ng", error, weight)
        better = loss < best
        for kept, found in (
            (best, loss),
            (best_scale, scale),
            (best_zero, zero),
            (best_shrink, shrink),
        ):
            torch.where(better, found, kept, out=kept)

    # 2-bit grids clip hard: their best range is far inside.
    least = 0.25 if bits == 2 else 0.4
    for step in range(COARSE):
        consider(torch.full_like(full, 1.0 - (1.0 - least) * step / (COARSE - 1)))
    around, spacing = best_shrink.clone(), (1.0 - least) / (COARSE - 1)
    for step in range(1, FINE):
        for sign in (-1.0, 1.0):
            offset = sign * spacing * step / FINE
            consider((around + offset).clamp(least, 1.0))
    # A group of zeros has scale 0: any positive scale represents it.
    best_scale = torch.where(best_scale > 0, best_scale, torch.ones_like(best_scale))
    return Grid(best_scale.to(scale_dtype).to(w.dtype), best_zero, bits)


@dataclass(frozen=True)
class Curvature:
    """What GPTQ needs of X̂ᵀX̂, computed once for all matrices that share an input.

    order: columns by falling power, so that the largest errors find the most columns to be moved
    onto. factor: upper-triangular U with UᵀU = H⁻¹ in that order, float32 [K, K]. power: the
    diagonal of X̂ᵀX̂, float32 [K], in the original order.
    """

    order: Tensor
    factor: Tensor
    power: Tensor

    @classmethod
    def of(cls, H: Tensor, damping: float = 0.01) -> Curvature:
        """Damp by a share of the mean diagonal, order, factorise.

        H: float [K, K]. An input that is always zero teaches nothing: all columns count alike, so
        that GPTQ rounds to nearest. Raises SaltireError if H is not finite.
        """
        if not all_finite(H):
            raise SaltireError(
                "the calibration activations hold NaN or infinity. Check the model and the text."
            )
        K = H.shape[0]
        power = H.diagonal()
        if power.max() <= 0:
            H, power = torch.eye(K), torch.ones(K)
        order = torch.argsort(power, descending=True)
        # In reversed order H = LLᵀ; back in this order that is MMᵀ with M upper-triangular, so
        # U = M⁻¹: half of the work of inverting H and factorising the inverse.
        backwards = order.flip(0)
        ridge = H.double()[backwards][:, backwards]
        ridge.diagonal().add_(damping * float(power.mean()))
        M = torch.linalg.cholesky(ridge).flip(0, 1)
        eye = torch.eye(len(H), dtype=M.dtype)
        U = torch.linalg.solve_triangular(M, eye, upper=True)
        return cls(order, U.float(), power.float())


def gptq(w: Tensor, curvature: Curvature, grid: Grid, group: int) -> Tensor:
    """Round w column by column, moving each column's error onto the columns not yet rounded.

    w: float [N, K]. Returns codes uint8 [N, K].
    """
    N, K = w.shape
    order, U = curvature.order, curvature.factor
    groups = (order // (group or K)).tolist()
    w = w.float()[:, order]
    codes = torch.empty(K, N)  # columns as rows, so that each is contiguous
    for start in range(0, K, BLOCK):
        stop = min(start + BLOCK, K)
        block = w[:, start:stop].T.contiguous()
        errors = torch.empty_like(block)
        inner = U[start:stop, start:stop]
        for j in range(stop - start):
            g = groups[start + j]
            code = codes[start + j] = grid.codes(block[j], g)
            errors[j] = (block[j] - grid.values(code, g)) / inner[j, j]
            if j + 1 < stop - start:
                block[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        if stop < K:
            w[:, stop:].addmm_(errors.T, U[start:stop, stop:], alpha=-1)
    result = torch.empty(N, K, dtype=torch.uint8)
    result[:, order] = codes.T.to(torch.uint8)
    return result
