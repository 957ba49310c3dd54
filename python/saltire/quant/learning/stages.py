"""What a recipe does to a whole model before its blocks are quantised, and after."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saltire.models.adapters import Adapter
from saltire.nn.linear_format import AnyFormat
from saltire.nn.quant_linear import QuantLinear
from saltire.processes import sum_over_all
from saltire.quant.blocks import BlockRunner
from saltire.quant.finite import all_finite
from saltire.quant.learning.end_to_end import Teacher, tune
from saltire.quant.recipe import Recipe
from saltire.quant.transforms.keys import fold_key_diagonal, key_diagonal
from saltire.quant.transforms.values import fold_turns, principal_turns

CHUNK = 2048  # tokens whose queries are held at once


def turn_values(runner: BlockRunner, block: nn.Module, adapter: Adapter) -> None:
    """Turn the values of a block that is not quantised yet (``transforms.values``). In place."""
    value, output = (block.get_submodule(name) for name in (adapter.value, adapter.output))
    assert isinstance(value, nn.Linear)
    assert isinstance(output, nn.Linear)
    x = runner.inputs_of(block, adapter.output)
    if not all_finite(x):
        return  # what is wrong is said, by name, where the linear is quantised
    size, share = adapter.attention(block).head_dim, output.in_features // value.out_features
    fold_turns(value, output, principal_turns(sum_over_all(x.T @ x), output.weight, size, share))
    runner.forget()


def balance_keys(runner: BlockRunner, block: nn.Module, adapter: Adapter) -> None:
    """Even out what queries and keys of a block that is not quantised yet carry, for a cache that
    rounds keys (``transforms.keys``). In place; nothing where a norm comes between."""
    query, key = (block.get_submodule(name) for name in adapter.groups[0][:2])
    assert isinstance(query, nn.Linear)
    assert isinstance(key, nn.Linear)
    attention = adapter.attention(block)
    if hasattr(attention, "k_norm"):
        return
    x = runner.inputs_of(block, adapter.groups[0][0])
    if not all_finite(x):
        return  # as above
    query_power, key_power = (_power_of_outputs(linear, x) for linear in (query, key))
    fold_key_diagonal(query, key, key_diagonal(query_power, key_power, attention.head_dim))
    runner.forget()


def _power_of_outputs(linear: nn.Linear, x: Tensor) -> Tensor:
    """The sum of squares of each output over the tokens of all processes: float32 [N]."""
    parts = [
        linear(part.to(linear.weight.dtype)).float().square().sum(0) for part in x.split(CHUNK)
    ]
    return sum_over_all(torch.stack(parts).sum(0))


def prepare(
    model: PreTrainedModel, adapter: Adapter, tokens: Tensor, recipe: Recipe, seed: int
) -> Callable[[], dict[str, AnyFormat]]:
    """Ask the teacher; returns what to call once the blocks are quantised, to learn end to end,
    which gives the formats that it has changed.

    Does nothing, and returns what does nothing, for a recipe without that step. tokens: int64
    [samples, T], this process's share.
    """
    learning = recipe.learning
    if learning is None or learning.epochs == 0:
        return dict
    teacher = Teacher.of(model, adapter, tokens)

    def finish() -> dict[str, AnyFormat]:
        tune(
            model,
            adapter,
            teacher,
            epochs=learning.epochs,
            rate=learning.rate,
            loss=learning.loss,
            seed=seed,
        )
        layers = {name: model.get_submodule(name) for name in adapter.linear_names(model)}
        return {name: m.format for name, m in layers.items() if isinstance(m, QuantLinear)}

    return finish
