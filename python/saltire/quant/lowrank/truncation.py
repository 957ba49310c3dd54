"""The best approximation of a weight by two thin factors, as the inputs that it meets see it.

Source: SVD-LLM (Wang et al., 2024), in the form of a projection: with XᵀX = C·Cᵀ and W·C = U·Σ·Vᵀ,
the best rank-R weight is U_R·U_Rᵀ·W. C is never inverted, so a singular XᵀX does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.quant.finite import all_finite

DAMPING = 1e-3  # of the mean power: directions that the calibration never showed are not free


@dataclass(frozen=True)
class Statistics:
    """The mean power of inputs, and a square root of it: moment = root·rootᵀ, float64 [K, K]."""

    moment: Tensor
    root: Tensor

    @classmethod
    def of(cls, x: Tensor, damping: float = DAMPING) -> Statistics:
        """From inputs x, float [tokens, K]."""
        return cls.of_moment((x.T @ x).double() / max(1, x.shape[0]), damping)

    @classmethod
    def of_moment(cls, moment: Tensor, damping: float = DAMPING) -> Statistics:
        """From XᵀX / tokens, float [K, K]; ``damping`` times its mean diagonal is added to it.

        Where Cholesky fails (a singular moment and no damping), the root comes from eigenvalues.
        Inputs that are always zero count all alike. Raises SaltireError if it is not finite.
        """
        moment = moment.double()
        if not all_finite(moment):
            raise SaltireError(
                "the calibration activations hold NaN or infinity. Check the model and the text."
            )
        mean = float(moment.diagonal().mean())
        eye = torch.eye(moment.shape[0], dtype=torch.float64)
        moment = eye if mean <= 0 else moment + damping * mean * eye
        root, failed = torch.linalg.cholesky_ex(moment)
        if failed or not all_finite(root):
            values, vectors = torch.linalg.eigh(moment)
            root = vectors * values.clamp_min(0).sqrt()
        return cls(moment, root)

    def norm(self, weight: Tensor) -> float:
        """Root of the mean squared length of x·weightᵀ; weight: float [N, K]."""
        return float((weight.double() @ self.root).norm())


@dataclass(frozen=True)
class Factors:
    """W ≈ up·down: up [N, R], down [R, K]; sigma [R], the root power that each rank carries.

    Between the two stands any invertible matrix G for nothing: z·G and G⁻¹·upᵀ give the same.
    """

    up: Tensor
    down: Tensor
    sigma: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def weight(self) -> Tensor:
        """What the factors stand for: float64 [N, K]."""
        return self.up.double() @ self.down.double()

    def through(self, gauge: Tensor, inverse: Tensor | None = None) -> Factors:
        """The same product with G [R, R] folded: down' = Gᵀ·down, up' = up·G⁻ᵀ."""
        back = torch.linalg.inv(gauge) if inverse is None else inverse
        return Factors(self.up @ back.T, gauge.T @ self.down, self.sigma)


def check_rank(rank: int, N: int, K: int, where: str = "the layer") -> None:
    """Raise SaltireError unless 1 <= rank <= min(N, K)."""
    if not 1 <= rank <= min(N, K):
        raise SaltireError(
            f"{where}: rank = {rank}; a weight of {N} x {K} has ranks 1 to {min(N, K)}. "
            "Choose one of them."
        )


def truncate(weight: Tensor, statistics: Statistics, rank: int) -> Factors:
    """The rank-R weight with the least mean ``‖x·Wᵀ - x·W_Rᵀ‖²``: up has orthonormal columns.

    weight: float [N, K], finite. Returns float64 factors; all of W's power is in ``down`` (its
    rows have root power sigma). The error is the root of the sum of the squares of the sigmas left
    out (``spectrum``). Raises SaltireError for a rank that the weight cannot have.
    """
    N, K = weight.shape
    check_rank(rank, N, K)
    W = weight.double()
    M = W @ statistics.root
    if N <= K:
        values, vectors = torch.linalg.eigh(M @ M.T)
        up = vectors.flip(1)[:, :rank]
    else:
        values, vectors = torch.linalg.eigh(M.T @ M)
        # QR instead of a division by sigma: ranks without power get some orthonormal direction.
        up = torch.linalg.qr(M @ vectors.flip(1)[:, :rank]).Q
    sigma = values.flip(0).clamp_min(0).sqrt()[:rank]
    return Factors(up, up.T @ W, sigma)


def spectrum(weight: Tensor, statistics: Statistics) -> Tensor:
    """All min(N, K) sigmas of ``truncate``, falling: float64."""
    M = weight.double() @ statistics.root
    gram = M @ M.T if M.shape[0] <= M.shape[1] else M.T @ M
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt()
