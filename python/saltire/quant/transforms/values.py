"""Turning a block's values into a basis in which a diagonal can do most, offline and exactly.

Noise of rounding is spread evenly by the rotation before it, so the error of a linear's outputs
goes as tr(TΣTᵀ)·tr(T⁻ᵀGT⁻¹), Σ = E[xxᵀ] and G = wᵀw. Over all T the least is reached where TᵀT is
Σ⁻¹ # G, the geometric mean of the two; a diagonal alone reaches it only where Σ and G have their
axes along the channels. Attention is linear in the values, so their axes can be turned, head by
head, in the weights that write them and in those that read them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RIDGE = 1e-4  # of the mean power: directions that the text hardly enters are not trusted


def geometric_mean(sigma: Tensor, gram: Tensor) -> Tensor:
    """``Σ⁻¹ # G``, the M = TᵀT of the transform with the least noise: float64 [K, K], trace K.

    With Σ = LLᵀ it is L⁻ᵀ(LᵀGL)^½L⁻¹. sigma, gram: float [K, K], positive semi-definite.
    """
    sigma, gram = (_regular(m.double()) for m in (sigma, gram))
    lower = torch.linalg.cholesky(sigma)
    values, vectors = torch.linalg.eigh(lower.T @ gram @ lower)
    half = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    mean = (half * values.clamp_min(0).sqrt()) @ half.T
    return mean * (len(mean) / mean.trace())


def principal_turns(sigma: Tensor, weight: Tensor, size: int, share: int) -> list[Tensor]:
    """One orthogonal turn a key-value head, for the ``share`` query heads that read it.

    sigma: float [K, K], second moments of what enters the output projection; weight: float [D, K],
    that projection. Returns K / size / share matrices, float64 [size, size].
    """
    gram = weight.double().T @ weight.double()
    turns = []
    for first in range(0, len(gram), size * share):
        heads = [slice(first + h * size, first + (h + 1) * size) for h in range(share)]
        power, reads = (
            torch.stack([m.double()[head, head] for head in heads]).sum(0) for m in (sigma, gram)
        )
        turns.append(torch.linalg.eigh(geometric_mean(power, reads))[1])
    return turns


@torch.no_grad()
def fold_turns(value: nn.Linear, output: nn.Linear, turns: list[Tensor]) -> None:
    """Turn the values that ``value`` writes and undo it where ``output`` reads them. In place.

    Exact: each head's output is a weighted sum of values, and a turn U goes through the sum,
    (Σ a v)·U·Uᵀ = Σ a v. turns: one orthogonal [d, d] a key-value head.
    """
    share = output.in_features // value.out_features
    narrow = torch.block_diag(*turns)
    wide = torch.block_diag(*[turn for turn in turns for _ in range(share)])
    dtype = value.weight.dtype
    value.weight.data = (narrow.T @ value.weight.double()).to(dtype)
    if value.bias is not None:
        value.bias.data = (narrow.T @ value.bias.double()).to(dtype)
    output.weight.data = (output.weight.double() @ wide).to(dtype)


def _regular(matrix: Tensor) -> Tensor:
    """The same with a ridge on its diagonal, so that it can be inverted; the identity for zeros."""
    power = matrix.diagonal().mean()
    if not power > 0:
        return torch.eye(len(matrix), dtype=matrix.dtype)
    ridge = matrix / power
    ridge.diagonal().add_(RIDGE)
    return ridge
