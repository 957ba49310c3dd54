"""How the errors of decomposition and quantisation add up on one layer, in either order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.quant.layer import check_activations, round_weights
from saltire.quant.lowrank.dam import apply_gauge
from saltire.quant.lowrank.factored import check_factored_rank, quantised_factors
from saltire.quant.lowrank.truncation import Factors, Statistics, truncate
from saltire.quant.recipe import Gauge, Recipe
from saltire.quant.recipes import parse_recipe


@dataclass(frozen=True)
class Interaction:
    """Errors of the outputs x·Wᵀ, each a norm over the norm of the outputs.

    e_L: of the truncation alone. e_Q: of quantising the whole weight and its input. lq, ql: of
    truncating and then quantising the factors, and of quantising the weight, truncating that and
    quantising its factors. inner: <E_L, E_LQ - E_L>, over the squared norm of the outputs; by it
    and e_factors (of quantising the factors, against the truncated weight),
    ``lq² = e_L² + e_factors² + 2·inner`` exactly.
    """

    rank: int
    e_L: float  # noqa: N815 (L and Q as in docs/dam.md)
    e_Q: float  # noqa: N815 (likewise)
    e_factors: float
    lq: float
    ql: float
    inner: float

    @property
    def excess_lq(self) -> float:
        """e_LQ - (e_L + e_Q) with the low rank first; negative: less than the sum."""
        return self.lq - (self.e_L + self.e_Q)

    @property
    def excess_ql(self) -> float:
        """The same with quantisation first."""
        return self.ql - (self.e_L + self.e_Q)


@torch.no_grad()
def interaction(
    weight: Tensor, x: Tensor, rank: int, recipe: str | Recipe, gauge: Gauge = "down"
) -> Interaction:
    """Measure both errors, alone and together in both orders, on the kernels that would run.

    weight: float [N, K]. x: float32 [tokens, K]. recipe: how weights and activations are rounded.
    gauge: how the truncated weight is split (``apply_gauge``); "down" is the plain SVD with Σ in
    the first factor. Raises SaltireError for a rank that is 0, over min(N, K) or no multiple of
    32, and for values that are not finite.
    """
    recipe = parse_recipe(recipe)
    N, K = weight.shape
    check_factored_rank(rank, N, K)
    check_activations(x, "x")
    weight = weight.float()
    statistics = Statistics.of(x)
    y = x @ weight.T
    size = float(y.norm())
    if size == 0:
        raise SaltireError("the outputs x·Wᵀ are all zero; there is no error to compare with.")

    low = truncate(weight, statistics, rank)
    truncated = x @ low.weight().float().T
    rounded = round_weights(x, weight, recipe, "the layer")
    whole = rounded.layer(0, N)

    def both(factors: Factors) -> Tensor:
        split = apply_gauge(factors, statistics, gauge)
        down, up = quantised_factors(x, split, recipe, "the layer")
        return up(down(x))

    lq = both(low)
    ql = both(truncate(rounded.weight(), statistics, rank))
    E_L, E_F = truncated - y, lq - truncated
    return Interaction(
        rank=rank,
        e_L=float(E_L.norm()) / size,
        e_Q=float((whole(x) - y).norm()) / size,
        e_factors=float(E_F.norm()) / size,
        lq=float((lq - y).norm()) / size,
        ql=float((ql - y).norm()) / size,
        inner=float((E_L.double() * E_F.double()).sum()) / size**2,
    )
