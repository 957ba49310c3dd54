"""A quantised weight with a branch of low rank for what it lost (Q + LR).

Sources: LQER, EoRA (the whitened residual), CALDERA (both in turns). The branch's factors are
quantised too, with DAM's diagonal or rotation between them; the branch is fitted last, to what the
rounded weight lost.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from saltire import ops
from saltire.nn.quant_linear import QuantLinear, decode_rows, encode_rows
from saltire.quant.gptq import Curvature, choose_grid
from saltire.quant.layer import InputRounding, check_activations, finite_linear, full_names, put
from saltire.quant.lowrank.dam import apply_gauge
from saltire.quant.lowrank.truncation import Factors, Statistics, truncate
from saltire.quant.recipe import LowRank, Recipe

TURNS = 3  # of branch and weight; each after the first has a smaller residual to work on

Stored = tuple[Tensor, Tensor | None]  # codes, and their scales


def residual_group(
    parent: nn.Module,
    names: tuple[str, ...],
    x: Tensor,
    recipe: Recipe,
    ranks: dict[str, int],
    path: str = "",
) -> dict[str, QuantLinear]:
    """Quantise linears that share the input x, each with a branch of its rank (0: none).

    x: float32 [tokens, K]. path: of ``parent``, for errors. Returns name -> new layer, put in
    place. Raises SaltireError as quantize_group does.
    """
    settings, where = recipe.low_rank, full_names(path, names)
    assert settings is not None
    check_activations(x, where)
    linears = [finite_linear(parent, name, path) for name in names]
    weights = [linear.weight.detach().float() for linear in linears]
    sizes = [len(weight) for weight in weights]
    statistics = Statistics.of(x)
    rounding = InputRounding.of(x, torch.cat(weights), recipe, where)
    seen = rounding.inputs(x)
    branches: list[Factors | None] = [None for _ in names]
    main = rounding.round(torch.cat(weights))
    for turn in range(TURNS if any(ranks[name] for name in names) else 0):
        if turn > 0:
            main = rounding.round(torch.cat(_without(weights, branches)))
        lost = [w - kept for w, kept in zip(weights, main.weight().split(sizes), strict=True)]
        branches = [
            truncate(rest, statistics, ranks[name]) if ranks[name] else None
            for name, rest in zip(names, lost, strict=True)
        ]
    made, start = {}, 0
    for name, linear, branch in zip(names, linears, branches, strict=True):
        stop = start + linear.out_features
        layer = main.layer(start, stop, linear.bias)
        if branch is not None:
            low = apply_gauge(branch, statistics, settings.gauge)
            factors = _store(low, rounding, seen, settings.branch_bits)
            layer = _with_branch(layer, factors, ranks[name], settings)
        made[name] = layer
        put(parent, name, layer)
        start = stop
    return made


def _without(weights: list[Tensor], branches: list[Factors | None]) -> list[Tensor]:
    """What is left of the weights for their rounding."""
    return [
        weight if branch is None else weight - branch.weight().float()
        for weight, branch in zip(weights, branches, strict=True)
    ]


def _store(low: Factors, rounding: InputRounding, seen: Tensor, bits: int) -> tuple[Stored, Stored]:
    """The branch as it is stored, the first factor in the basis of the transformed input."""
    down = _encode(rounding.weights(low.down.float()), rounding.curvature, bits)
    z = seen @ decode_rows(*down, bits).T
    return down, _encode(low.up.float(), Curvature.of(z.T @ z), bits)


def _encode(weight: Tensor, curvature: Curvature, bits: int) -> Stored:
    """Rows in ``bits`` bits: 16 and 8 to nearest, 4 by GPTQ."""
    if bits > 4:
        return encode_rows(weight, bits)
    grid = choose_grid(weight, curvature.power, 4, 0, False, torch.float32)
    return ops.pack_weight(curvature.round(weight, grid), 4), grid.scale[:, 0].clone()


def _with_branch(
    layer: QuantLinear, factors: tuple[Stored, Stored], rank: int, settings: LowRank
) -> QuantLinear:
    """The same layer with a stored branch."""
    format = replace(layer.format, rank=rank, rank_bits=settings.branch_bits)
    new = QuantLinear(layer.in_features, layer.out_features, format, bias=layer.bias is not None)
    for name in ("weight_packed", "weight_scale", "weight_zero", "diag", "left", "bias"):
        setattr(new, name, getattr(layer, name))
    (new.branch_in, new.branch_in_scale), (new.branch_out, new.branch_out_scale) = factors
    return new
