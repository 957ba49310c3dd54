"""Which way the linears of a model go: alike, by a budget, two factors, or a residual branch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel

from saltire.models.adapters import Adapter
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.quant_linear import QuantLinear
from saltire.quant.layer import quantize_group
from saltire.quant.lowrank.budget import allocate, branch_ranks, spectra
from saltire.quant.lowrank.factored import factor_group
from saltire.quant.lowrank.residual import residual_group
from saltire.quant.mixed import mixed_recipes
from saltire.quant.recipe import Recipe

# (block, its path, names of linears that share an input, that input) -> name -> new layer
GroupMethod = Callable[
    [nn.Module, str, tuple[str, ...], Tensor], Mapping[str, QuantLinear | FactoredQuantLinear]
]


def kept_whole(checkpoint: Path) -> str:
    """Says how many linears of a checkpoint have two factors, and how many are whole."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    layers = config["quantization_config"]["layers"].values()
    factored = sum("down" in format for format in layers)
    whole = sum("weight_bits" in format for format in layers)
    return (
        f"{factored} linears in two factors, {whole} whole: a whole one is "
        "smaller than the factors it needs, or loses too much in them"
    )


def group_method(
    model: PreTrainedModel, adapter: Adapter, tokens: Tensor, batch: int, recipe: Recipe
) -> GroupMethod:
    """What to do with each group of linears under a recipe, its bytes already dealt out.

    Raises SaltireError for a budget that cannot be met, before anything is changed.
    """
    settings = recipe.low_rank
    if recipe.mixed:
        recipes = mixed_recipes(model, adapter, tokens, batch, recipe)
        return lambda block, path, names, x: quantize_group(
            block, names, x, recipes[f"{path}.{names[0]}"], path
        )
    if settings is None:
        return lambda block, path, names, x: quantize_group(block, names, x, recipe, path)
    layers = spectra(model, adapter, tokens, batch)
    if settings.kind == "factored":
        ranks = allocate(layers, settings.share, recipe.weight_bits)
        return lambda block, path, names, x: factor_group(
            block, names, x, recipe, {name: ranks[f"{path}.{name}"] for name in names}, path
        )
    sizes = branch_ranks(
        layers, settings.share, recipe.weight_bits, settings.branch_bits, recipe.group
    )
    return lambda block, path, names, x: residual_group(
        block, names, x, recipe, {name: sizes[f"{path}.{name}"] for name in names}, path
    )
