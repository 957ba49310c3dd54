"""What GPTQ (``ops.gptq_round``) needs to round a matrix: grids and the curvature of its error.

Source: Frantar et al., GPTQ (2022). Differs: the statistics are those of the rounded activations,
and grids are chosen under the error that GPTQ minimises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire import ops
from saltire.errors import SaltireError
from saltire.quant.finite import all_finite
from saltire.reference.lowbit_gemm import SYMMETRIC_ZERO

COARSE, FINE = 13, 4  # ranges of a grid that are tried, and steps to the next on either side
DAMPING = 0.01  # of the mean diagonal, added to all of it: GPTQ's own
SOLVED_AT_ONCE = 128  # columns of a triangle below which halving it costs more than it saves


@dataclass(frozen=True)
class Grid:
    """Levels ``scale · (code - zero)``: scale and zero float [N, groups]."""

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, w: Tensor) -> Tensor:
        """Nearest codes: w [N, K] -> float [N, K] of integers in [0, 2**bits)."""
        levels = self._grouped(w) / self.scale[..., None] + self.zero[..., None]
        return levels.round_().clamp_(0, 2**self.bits - 1).view(w.shape)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for: [N, K] -> [N, K]."""
        return ((self._grouped(codes) - self.zero[..., None]) * self.scale[..., None]).view(
            codes.shape
        )

    def _grouped(self, w: Tensor) -> Tensor:
        return w.reshape(len(w), self.scale.shape[1], -1)


def choose_grid(
    w: Tensor,
    importance: Tensor,
    bits: int,
    group: int,
    zero_points: bool,
    scale_dtype: torch.dtype,
    clip: bool = True,
) -> Grid:
    """The scales (and zeros) that lose least, by search over shrunken ranges: coarse, then fine.

    w: float [N, K]; importance: float [K], the power of each input; clip: false to span the whole
    range. Returns scales rounded to ``scale_dtype``, so that codes are chosen for the scale that
    will be stored.
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
    tiny = torch.finfo(scale_dtype).tiny  # of a group of zeros: any scale above 0 represents it
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
    for step in range(COARSE if clip else 1):
        consider(torch.full_like(full, 1.0 - (1.0 - least) * step / (COARSE - 1)))
    around, spacing = best_shrink.clone(), (1.0 - least) / (COARSE - 1)
    for step in range(1, FINE if clip else 1):
        for sign in (-1.0, 1.0):
            offset = sign * spacing * step / FINE
            consider((around + offset).clamp(least, 1.0))
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
    def of(cls, H: Tensor) -> Curvature:
        """Damp by DAMPING of the mean diagonal, order, factorise.

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
        ridge.diagonal().add_(DAMPING * float(power.mean()))
        M = torch.linalg.cholesky(ridge).flip(0, 1)
        return cls(order, upper_inverse(M).float(), power.float())

    def round(self, w: Tensor, grid: Grid) -> Tensor:
        """Codes uint8 [N, K] of w, float [N, K]: each column makes up for those before it."""
        return ops.gptq_round(w.float(), self.order, self.factor, grid.scale, grid.zero, grid.bits)


def upper_inverse(M: Tensor) -> Tensor:
    """M⁻¹ of an upper-triangular M, float64 [K, K].

    By halves, so that most of the work is in products of two matrices, and what is below the
    diagonal is left out: 65 ms instead of 154 for solving for an identity, at K = 1,536.
    """
    K = len(M)
    if K <= SOLVED_AT_ONCE:
        return torch.linalg.solve_triangular(M, torch.eye(K, dtype=M.dtype), upper=True)
    half = K // 2
    result = torch.zeros_like(M)
    result[:half, :half] = upper_inverse(M[:half, :half])
    result[half:, half:] = upper_inverse(M[half:, half:])
    result[:half, half:] = -(result[:half, :half] @ M[:half, half:]) @ result[half:, half:]
    return result
