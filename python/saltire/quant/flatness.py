"""How evenly the magnitude of a matrix is spread: BDQ's Flatness, two ways. Lower is flatter.

Source: BDQ, section 2. The paper's printed formula is an entropy with free weights; its printed
*numbers* are closer to the second form (docs/bdq.md compares them), so both are here.
"""

from __future__ import annotations

import torch
from torch import Tensor


def flatness_entropy(W: Tensor, iterations: int = 0) -> float:
    """``Σ p ln p + ln(mn)`` with ``p_ij = W_ij² / ΣW²``: 0 for constant magnitude, in nats.

    W: float [m, n]. iterations: rounds of Sinkhorn balancing of W² before it is measured, which
    approaches the least value that any row and column diagonals can reach (0: as it is). Returns a
    value in [0, ln(mn)]; NaN for a matrix of zeros.
    """
    power = W.double().square()
    for _ in range(iterations):
        power = power / power.sum(1, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
        power = power / power.sum(0, keepdim=True).clamp_min(torch.finfo(power.dtype).tiny)
    p = power / power.sum()
    return float(torch.special.xlogy(p, p).sum() + torch.tensor(float(p.numel())).double().log())


def flatness_meanabs(W: Tensor) -> float:
    """Flatness by mean magnitudes, in nats per element.

    p_ij = W_ij² / (α_i β_j), α_i and β_j the mean magnitudes of row i and column j; the result is
    ``mean(p ln p)``: 0 for a matrix of constant magnitude, 1.856 for a Gaussian one, larger with
    outliers. W: float [m, n].
    """
    magnitude = W.double().abs()
    alpha = magnitude.mean(1, keepdim=True)
    beta = magnitude.mean(0, keepdim=True)
    p = magnitude.square() / (alpha * beta).clamp_min(torch.finfo(magnitude.dtype).tiny)
    return float(torch.special.xlogy(p, p).mean())
