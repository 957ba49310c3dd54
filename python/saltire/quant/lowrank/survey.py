"""The interaction of truncation and quantisation over the layers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for
from saltire.progress import track
from saltire.quant.blocks import BlockRunner
from saltire.quant.layer import check_activations, finite_linear, full_names
from saltire.quant.lowrank.factored import RANK_MULTIPLE
from saltire.quant.lowrank.interaction import Interaction, interaction
from saltire.quant.recipe import Gauge, Recipe

SHARES = (0.125, 0.25, 0.5, 0.75)  # of the smaller side
MOST_TOKENS = 1024  # of the input of one layer


@dataclass(frozen=True)
class Measured:
    """One layer at one rank. share: of the rank of min(N, K), as asked for."""

    layer: str
    share: float
    result: Interaction


@torch.no_grad()
def survey(
    model: PreTrainedModel,
    tokens: Tensor,
    recipe: Recipe,
    *,
    gauge: Gauge = "down",
    shares: Sequence[float] = SHARES,
    every: int = 1,
) -> list[Measured]:
    """``interaction`` for every linear of every ``every``-th block, at ranks that are shares of
    min(N, K), rounded to what the kernels take.

    tokens: int64 [samples, T]. The model is not changed. Raises SaltireError for shares outside
    (0, 1], for a model with quantised layers and for values that are not finite.
    """
    if not shares or any(not 0 < share <= 1 for share in shares):
        raise SaltireError(f"shares = {list(shares)}; expected shares of the full rank in (0, 1].")
    if every < 1:
        raise SaltireError(f"every = {every}; expected at least 1.")
    adapter = adapter_for(model.config)
    runner = BlockRunner(model, adapter, tokens, 1)
    found = []
    for index, block in enumerate(track(adapter.blocks(model), "measuring interactions")):
        path = f"{adapter.blocks_path}.{index}"
        for group in adapter.groups if index % every == 0 else ():
            x = runner.inputs_of(block, group[0])
            check_activations(x, full_names(path, group))
            x = x[:: -(-len(x) // MOST_TOKENS)]
            for name in group:
                weight = finite_linear(block, name, path).weight.detach()
                most = min(weight.shape) // RANK_MULTIPLE * RANK_MULTIPLE
                if not most:
                    continue  # no rank that the kernels could run
                for share in shares:
                    rank = round(share * min(weight.shape) / RANK_MULTIPLE) * RANK_MULTIPLE
                    rank = min(max(rank, RANK_MULTIPLE), most)
                    result = interaction(weight, x, rank, recipe, gauge)
                    found.append(Measured(f"{index}.{name.rpartition('.')[2]}", share, result))
        runner.advance(block)
    return found
