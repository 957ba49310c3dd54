"""DAM: a diagonal between the factors, and a rotation behind it, both folded at no cost.

Source: DAM, section 4, as far as it is known (docs/dam.md): a rank-wise diagonal. Its closed form
and the rotation are ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saltire.quant.lowrank.truncation import Factors, Statistics
from saltire.quant.recipe import Gauge
from saltire.reference.transform_quantize import hadamard_matrix, hartley_matrix


def dam_diagonal(rms_z: Tensor, rms_up: Tensor) -> Tensor:
    """``d_k² = rms up_k / rms z_k``, as z' = z·diag(d) and up' = up·diag(d)⁻¹: float64 [R].

    Rounding z' to one scale a token leaves noise of the power Σ_k d_k²·z_k² in every rank, which
    meets Σ_k |up_k|²/d_k²; rounding up' to one scale an output leaves noise of the power
    Σ_k |up_k|²/d_k², which meets Σ_k d_k²·z_k². Both products are least, (Σ_k |z_k|·|up_k|)², at
    this d (Cauchy-Schwarz). Ranks without power on one side keep the mean of the rest; the
    geometric mean is 1.

    rms_z, rms_up: float [R], of the columns of z and of up.
    """
    ratio = rms_up.double() / rms_z.double()
    alive = torch.isfinite(ratio) & (ratio > 0)
    log_d = torch.where(alive, ratio.clamp_min(1e-300).log() / 2, torch.zeros_like(ratio))
    if alive.any():
        log_d = torch.where(alive, log_d - log_d[alive].mean(), torch.zeros_like(log_d))
    # Beyond e⁸ either side of the mean a rank carries nothing that f32 codes could show.
    return log_d.clamp(-8.0, 8.0).exp()


def mixing_rotation(R: int) -> Tensor:
    """An orthogonal matrix with even entries for any R: Hadamard ⊗ Hartley, float64 [R, R]."""
    B = math.gcd(4096, R)
    return torch.kron(hartley_matrix(R // B), hadamard_matrix(B))


def rms_of_ranks(factors: Factors, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Root mean squares of z = x·downᵀ and of the columns of up: float64 [R] each."""
    z = (factors.down.double() @ statistics.root).square().sum(1).sqrt()
    return z, factors.up.double().square().mean(0).sqrt()


def apply_gauge(
    factors: Factors, statistics: Statistics, gauge: Gauge, diagonal: Tensor | None = None
) -> Factors:
    """Factors of the same product, split as ``gauge`` says.

    down: Σ stays in the first factor (truncate's own split). up: Σ goes to the second. balanced:
    its root to each. closed: DAM's diagonal. hadamard: DAM's diagonal and a rotation of the ranks.
    learned, learned-hadamard: as closed and hadamard, with the ``diagonal`` that was learned.
    """
    if gauge == "down":
        return factors
    if gauge in ("up", "balanced"):
        sigma = factors.sigma.clamp_min(float(factors.sigma.max()) * 1e-9 + 1e-300)
        d = sigma ** (-1.0 if gauge == "up" else -0.5)
    else:
        d = dam_diagonal(*rms_of_ranks(factors, statistics)) if diagonal is None else diagonal
    split = factors.through(d.diag(), (1.0 / d).diag())
    if not gauge.endswith("hadamard"):
        return split
    rotation = mixing_rotation(factors.rank)
    return split.through(rotation, rotation.T)
