"""Two quantised factors in place of a weight: truncate, split, round one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.linear_format import FactoredFormat
from saltire.nn.quant_linear import QuantLinear
from saltire.quant.layer import (
    check_activations,
    finite_linear,
    full_names,
    put,
    round_weights,
)
from saltire.quant.lowrank.dam import apply_gauge
from saltire.quant.lowrank.learning import learn_diagonal
from saltire.quant.lowrank.truncation import Factors, Statistics, check_rank, truncate
from saltire.quant.recipe import LowRank, Recipe

RANK_MULTIPLE = 32  # ranks are the inputs of the second product, which come 32 at a time


def check_factored_rank(rank: int, N: int, K: int, where: str = "the layer") -> None:
    """Raise SaltireError unless two factors of this rank exist and the kernels can run them."""
    check_rank(rank, N, K, where)
    if rank % RANK_MULTIPLE:
        low = rank // RANK_MULTIPLE * RANK_MULTIPLE
        near = [r for r in (low, low + RANK_MULTIPLE) if 0 < r <= min(N, K)]
        raise SaltireError(
            f"{where}: rank = {rank}; expected a multiple of {RANK_MULTIPLE}, as it is the number "
            f"of inputs of the second product. Nearest: {' or '.join(map(str, near)) or 'none'}."
        )


def quantised_factors(
    x: Tensor, factors: Factors, recipe: Recipe, where: str
) -> tuple[QuantLinear, QuantLinear]:
    """Both factors as quantised linears; the second is rounded for what the first gives out."""
    down = round_weights(x, factors.down.float(), recipe, where).layer(0, factors.rank)
    return down, _second(down, x, factors, recipe, where, None)


def _second(
    down: QuantLinear, x: Tensor, factors: Factors, recipe: Recipe, where: str, bias: Tensor | None
) -> QuantLinear:
    ranks, up = down(x), factors.up.float()
    return round_weights(ranks, up, recipe.between_factors(), where).layer(0, up.shape[0], bias)


@dataclass(frozen=True)
class _Part:
    """One linear of a group on its way: its factors, or the whole weight where rank is None."""

    name: str
    linear: nn.Linear
    factors: Factors | None

    @property
    def first(self) -> Tensor:
        """What meets the input: float32 [R, K] or [N, K]."""
        whole = self.linear.weight.detach()
        return (whole if self.factors is None else self.factors.down).float()


def factor_group(
    parent: nn.Module,
    names: tuple[str, ...],
    x: Tensor,
    recipe: Recipe,
    ranks: dict[str, int | None],
    path: str = "",
) -> dict[str, QuantLinear | FactoredQuantLinear]:
    """Put quantised factors in place of linears that share the input x.

    x: float32 [tokens, K], what enters them in the model compressed so far. ranks: of each linear;
    None keeps it whole. path: of ``parent``, for errors. All first factors (and whole weights) get
    one transform of the input, so that it is quantised once. Returns name -> new layer. Raises as
    quantize_group does.
    """
    settings, where = recipe.low_rank, full_names(path, names)
    assert settings is not None
    check_activations(x, where)
    statistics = Statistics.of(x)
    parts = []
    for name in names:
        linear, rank = finite_linear(parent, name, path), ranks[name]
        full = full_names(path, (name,))
        factors = None
        if rank is not None:
            check_factored_rank(rank, linear.out_features, linear.in_features, full)
            weight = linear.weight.detach().float()
            factors = split(weight, x, statistics, rank, recipe, settings, full)
        parts.append(_Part(name, linear, factors))
    rounded = round_weights(x, torch.cat([part.first for part in parts]), recipe, where)
    made: dict[str, QuantLinear | FactoredQuantLinear] = {}
    start = 0
    for part in parts:
        stop = start + part.first.shape[0]
        N, K, bias = part.linear.out_features, part.linear.in_features, part.linear.bias
        new: QuantLinear | FactoredQuantLinear
        if part.factors is None:
            new = rounded.layer(start, stop, bias)
        else:
            down = rounded.layer(start, stop)
            up = _second(down, x, part.factors, recipe, full_names(path, (part.name,)), bias)
            format = FactoredFormat(part.factors.rank, down.format, up.format)
            new = FactoredQuantLinear(K, N, format, bias=bias is not None)
            new.down, new.up = down, up
        put(parent, part.name, new)
        made[part.name] = new
        start = stop
    return made


def split(
    weight: Tensor,
    x: Tensor,
    statistics: Statistics,
    rank: int,
    recipe: Recipe,
    settings: LowRank,
    where: str,
) -> Factors:
    """Truncate a weight [N, K] (or its quantised self) and fold what stands between the factors."""
    if settings.quantise_first:
        weight = round_weights(x, weight, recipe, where).weight()
    factors = truncate(weight, statistics, rank)
    diagonal = None
    if settings.gauge.startswith("learned"):
        diagonal = learn_diagonal(x, factors, statistics, recipe).diagonal
    return apply_gauge(factors, statistics, settings.gauge, diagonal)
