"""Blocks run once: what is kept of a part must be what computing it again would give."""

from __future__ import annotations

import pytest
import torch

from saltire.models.adapters import adapter_for
from saltire.quant import RECIPES
from saltire.quant.blocks import BlockRunner
from saltire.quant.layer import quantize_group
from saltire.quant.learning.stages import turn_values
from tests.tiny import random_tokens, tiny_model


class Recomputing(BlockRunner):
    """Keeps nothing."""

    def inputs_of(self, block: torch.nn.Module, linear: str) -> torch.Tensor:
        self.forget()
        return super().inputs_of(block, linear)

    def advance(self, block: torch.nn.Module) -> None:
        self.forget()
        super().advance(block)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_is_kept_of_a_block_is_what_computing_it_again_gives(architecture, dtype) -> None:
    seen: list[list[torch.Tensor]] = []
    for kind in (BlockRunner, Recomputing):
        model = tiny_model(architecture).to(dtype)
        adapter = adapter_for(model.config)
        runner = kind(model, adapter, random_tokens(model, 4, 24), 2)
        inputs = []
        for block in adapter.blocks(model):
            for group in adapter.groups:
                inputs.append(runner.inputs_of(block, group[0]).clone())
                quantize_group(block, group, inputs[-1], RECIPES["w4a4"])
            runner.advance(block)
        inputs.append(runner.hidden.all().clone())
        seen.append(inputs)
    assert all(torch.equal(kept, again) for kept, again in zip(*seen, strict=True))


@torch.no_grad()
def test_what_is_kept_goes_when_its_block_changes_or_is_left() -> None:
    seen: list[list[torch.Tensor]] = []
    for kind in (BlockRunner, Recomputing):
        model = tiny_model("llama", num_hidden_layers=3)
        adapter = adapter_for(model.config)
        first, second, third = adapter.blocks(model)
        runner = kind(model, adapter, random_tokens(model, 4, 24), 2)
        turn_values(runner, first, adapter)
        runner.advance(first)  # with the turned values
        found = [runner.hidden.all().clone()]
        found.append(runner.inputs_of(second, "mlp.down_proj").clone())  # its own attention
        runner.advance(second)
        runner.advance(third)  # nothing was asked of it
        seen.append([*found, runner.hidden.all().clone()])
    assert all(torch.equal(kept, again) for kept, again in zip(*seen, strict=True))


@torch.no_grad()
def test_attention_is_computed_once_a_block_and_batch() -> None:
    model = tiny_model("llama")
    adapter = adapter_for(model.config)
    runner = BlockRunner(model, adapter, random_tokens(model, 4, 24), 2)
    block, calls = adapter.blocks(model)[0], 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    block.get_submodule("self_attn.v_proj").register_forward_hook(count)
    for group in adapter.groups:
        runner.inputs_of(block, group[0])
    runner.advance(block)
    assert calls == 2
    runner.inputs_of(adapter.blocks(model)[1], "self_attn.o_proj")  # nothing of the last block's
    assert "forward" not in vars(block.get_submodule("self_attn"))
