"""Blocks run once: what is kept of a part must be what computing it again would give."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for
from saltire.quant import RECIPES
from saltire.quant.activations import ActivationFile
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


@torch.no_grad()
def test_a_runner_goes_on_from_the_states_that_are_there_and_from_no_others(tmp_path: Path) -> None:
    model = tiny_model("llama")
    adapter = adapter_for(model.config)
    files = (tmp_path / "even", tmp_path / "odd")
    made = (model, adapter, random_tokens(model, 4, 24), 2)
    runner = BlockRunner(*made, files=files)
    runner.advance(adapter.blocks(model)[0])
    runner.flush()
    again = BlockRunner(*made, files=files, start=1)
    assert torch.equal(again.hidden.all(), runner.hidden.all())
    files[1].write_bytes(files[1].read_bytes() + bytes(4))
    with pytest.raises(SaltireError, match=r"odd: expected 24576 bytes, came 24580 bytes\. Remove"):
        BlockRunner(*made, files=files, start=1)


def test_activations_are_read_back(tmp_path: Path) -> None:
    file = ActivationFile(3, (2, 5), tmp_path / "states")
    values = torch.randn(3, 2, 5)
    for index in range(3):
        file[index] = values[index]
    assert torch.equal(file.all(), values)
    file.flush()
    again = ActivationFile(3, (2, 5), tmp_path / "states")
    assert torch.equal(again[1], values[1])
    assert (tmp_path / "states").stat().st_size == values.nbytes


def test_a_full_disk_takes_only_the_file_that_was_made(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"12345678")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
        for name in ("old", "new"):
            with pytest.raises(SaltireError, match="cannot keep"):
                ActivationFile(3, (20, 5), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert (tmp_path / "old").read_bytes()[:8] == b"12345678"
    assert not (tmp_path / "new").exists()
