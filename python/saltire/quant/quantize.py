"""Quantise a whole model, block after block, with activations of the blocks already quantised."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saltire import processes
from saltire.errors import SaltireError
from saltire.models.adapters import Adapter, adapter_for, share_inputs
from saltire.models.hf_quantizer import SaltireConfig, SaltireHfQuantizer, replace_layer
from saltire.models.kv_rounding import set_kv_bits
from saltire.nn.linear_format import AnyFormat, read_format
from saltire.nn.quant_linear import QuantLinear
from saltire.progress import track
from saltire.quant.blocks import BlockRunner
from saltire.quant.embedding import round_embedding
from saltire.quant.gptq import DAMPING
from saltire.quant.journal import Journal
from saltire.quant.layer import put, quantize_group
from saltire.quant.learning.stages import balance_keys, prepare, turn_values
from saltire.quant.lowrank.compress import GroupMethod, group_method
from saltire.quant.recipe import Recipe
from saltire.quant.recipes import parse_recipe
from saltire.quant.texts import calibration_tokens


class Weights(Protocol):
    """Where the weights of a block come from, and where it goes when it is finished."""

    def fill(self, module: nn.Module, prefix: str) -> None: ...
    def empty(self, module: nn.Module) -> None: ...


class Resident:
    """All weights are in memory and stay there."""

    def fill(self, module: nn.Module, prefix: str) -> None: ...
    def empty(self, module: nn.Module) -> None: ...


class Observer(Protocol):
    """Sees every block before and after it is quantised, with the runner that feeds it."""

    def before(self, index: int, block: nn.Module, runner: BlockRunner) -> None: ...
    def after(self, index: int, block: nn.Module, runner: BlockRunner) -> None: ...


@dataclass
class Pass:
    """One pass over the blocks of a model. tokens: int64 [samples, T], this process's share."""

    model: PreTrainedModel
    adapter: Adapter
    recipe: Recipe
    tokens: Tensor
    batch: int
    weights: Weights
    journal: Journal | None = None
    observer: Observer | None = None

    def run(self) -> dict[str, AnyFormat]:
        """Quantise what is not yet quantised; full name -> format of every layer.

        Raises SaltireError before anything is changed for layers that the recipe does not fit.
        Warns (UserWarning) of fewer tokens than a layer has inputs.
        """
        model, adapter, journal = self.model, self.adapter, self.journal
        check_layers(model, adapter, self.recipe)
        self._warn_of_few_tokens()
        set_kv_bits(model, self.recipe.kv_bits)
        method = group_method(model, adapter, self.tokens, self.batch, self.recipe)
        done = 0 if journal is None else journal.finished()
        formats = self._embedding()
        for index in range(done):
            formats |= self._restore(index)
        files = None if journal is None else journal.states()
        runner = BlockRunner(model, adapter, self.tokens, self.batch, files=files, start=done)
        blocks = list(enumerate(adapter.blocks(model)))[done:]
        for index, block in track(blocks, f"quantising to {self.recipe.name}"):
            path = self._path(index)
            self.weights.fill(block, path)
            if self.observer is not None:
                self.observer.before(index, block, runner)
            if self.recipe.turns_values:
                turn_values(runner, block, adapter)
            if self.recipe.balances_keys:
                balance_keys(runner, block, adapter)
            made = quantize_block(block, path, adapter, runner, method)
            if self.observer is not None:
                self.observer.after(index, block, runner)
            runner.advance(block)
            rest = getattr(torch, self.recipe.rest_dtype)
            round_rest(block, rest)
            if journal is not None:
                runner.flush()
                processes.barrier()  # the states of all processes, before the block counts
                values = {name: format.to_dict() for name, format in made.items()}
                journal.keep_block(index, path, block, values, rest)
            formats |= made
            self.weights.empty(block)
        return formats | self._head(runner)

    def _warn_of_few_tokens(self) -> None:
        inputs = rounded_inputs(self.model, self.adapter, self.recipe)
        name, most = max(inputs.items(), key=lambda item: item[1], default=("", 0))
        tokens = self.tokens.numel() * processes.world_size()
        if tokens < most and processes.rank() == 0:
            warnings.warn(
                f"{tokens} calibration tokens for up to {most} inputs ({name}): GPTQ's Hessian is "
                f"singular there, and the {DAMPING:.0%} that damps it decides how weights are "
                f"rounded. Give more samples (--samples): at least {most} tokens in all.",
                stacklevel=5,  # who calls quantize: run, quantize and no_grad lie between
            )

    def _embedding(self) -> dict[str, AnyFormat]:
        """Round the embedding, unless it also is a head that stays as it is."""
        recipe, old = self.recipe, self.model.get_input_embeddings()
        if not recipe.rounds_embedding(getattr(self.model.config, "tie_word_embeddings", False)):
            return {}
        assert isinstance(old, nn.Embedding)
        path = next(name for name, module in self.model.named_modules() if module is old)
        made = round_embedding(old, recipe.embedding_bits, path)
        put(self.model, path, made)
        return {path: made.format}

    def _head(self, runner: BlockRunner) -> dict[str, AnyFormat]:
        if not self.recipe.rounds_head:
            return {}
        norm, head_path = self.model.get_submodule(self.adapter.norm_path), self.adapter.head_path
        self.weights.fill(norm, self.adapter.norm_path)
        x = runner.outputs(norm)
        self.weights.fill(self.model.get_submodule(head_path), head_path)
        recipe = self.recipe.head_recipe(x.shape[1])
        head = quantize_group(self.model, (head_path,), x, recipe)[head_path]
        return {head_path: head.format}

    def _restore(self, index: int) -> dict[str, AnyFormat]:
        """Put a block of an earlier run in place, unless blocks leave memory anyway."""
        assert self.journal is not None
        formats = {
            name: read_format(values) for name, values in self.journal.formats(index).items()
        }
        if isinstance(self.weights, Resident):
            for name, format in formats.items():
                replace_layer(self.model, name, format)
            prefix = f"{self._path(index)}."
            block = self.adapter.blocks(self.model)[index]
            tensors = self.journal.tensors(index)
            block.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items()})
        return formats

    def _path(self, index: int) -> str:
        return f"{self.adapter.blocks_path}.{index}"


def quantize_block(
    block: nn.Module, path: str, adapter: Adapter, runner: BlockRunner, method: GroupMethod
) -> dict[str, AnyFormat]:
    """Quantise the linears of a block in place; full name -> format."""
    formats: dict[str, AnyFormat] = {}
    for group in adapter.groups:
        x = runner.inputs_of(block, group[0])
        for name, new in method(block, path, group, x).items():
            formats[f"{path}.{name}"] = new.format
    return formats


def rounded_inputs(model: nn.Module, adapter: Adapter, recipe: Recipe) -> dict[str, int]:
    """Full name -> inputs of the linears that a recipe rounds, the head last; shapes are enough."""
    names = [*adapter.linear_names(model), *([adapter.head_path] if recipe.rounds_head else [])]
    layers = {name: model.get_submodule(name) for name in names}
    return {name: m.in_features for name, m in layers.items() if isinstance(m, nn.Linear)}


def check_layers(model: nn.Module, adapter: Adapter, recipe: Recipe) -> None:
    """Raise SaltireError, naming the first, for layers whose inputs the recipe does not fit."""
    for name, inputs in rounded_inputs(model, adapter, recipe).items():
        if name == adapter.head_path:
            layer = recipe.head_recipe(inputs)
        else:  # a budget chooses groups that fit
            layer = replace(recipe, group=0) if recipe.mixed else recipe
        layer.format().check_fits(name, inputs)


@torch.no_grad()
def quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: str | Recipe = "w4a4",
    calibration: str | Tensor = "self",
    *,
    samples: int = 16,
    length: int = 512,
    batch: int = 4,
    seed: int = 0,
    journal: Journal | None = None,
    observer: Observer | None = None,
) -> PreTrainedModel:
    """Quantise the linears of every block in place; returns the model.

    calibration: ``"self"`` (text sampled from the model), a ``.txt`` or ``.jsonl`` file, a Hugging
    Face dataset, or tokens int64 [samples, length]. batch: samples run at once. journal: keeps what
    is finished, for a run that goes on after a kill (``saltire.quant.job`` makes one). Under
    torchrun the processes divide the samples. Afterwards ``model.save_pretrained`` writes packed
    integers. Raises SaltireError for an unsupported architecture, a model already quantised, layers
    that the recipe does not fit, or unusable calibration; warns of fewer tokens than a layer has
    inputs.
    """
    recipe = parse_recipe(recipe)
    adapter = adapter_for(model.config)
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        found = getattr(getattr(model.config, "quantization_config", None), "recipe", "")
        raise SaltireError(
            f"the model is already quantised{f' to {found}' if found else ''}. Start from the "
            "original model."
        )
    check_layers(model, adapter, recipe)  # Pass.run would, but text is long to sample
    model.eval()
    tokens = None if journal is None else journal.tokens()
    if tokens is None:
        tokens = (
            calibration
            if isinstance(calibration, Tensor)
            else calibration_tokens(
                calibration, model, tokenizer, samples=samples, length=length, seed=seed
            )
        )
        tokens = processes.from_first(tokens)
        if journal is not None:
            journal.keep_tokens(tokens)
    part, batch = share_of(tokens, batch)
    finish = prepare(model, adapter, part, recipe, seed)
    formats = Pass(model, adapter, recipe, part, batch, Resident(), journal, observer).run()
    formats |= finish()
    if recipe.rounds_head:
        model.config.tie_word_embeddings = False
    round_rest(model, getattr(torch, recipe.rest_dtype))
    attach_config(model, recipe, formats)
    share_inputs(model)
    return model


def share_of(tokens: Tensor, batch: int) -> tuple[Tensor, int]:
    """This process's samples, cut to whole batches, and the samples of one batch."""
    mine = processes.share(len(tokens), "calibration samples")
    tokens = tokens[mine.start : mine.stop]
    batch = min(batch, len(tokens))
    return tokens[: len(tokens) // batch * batch], batch


def round_rest(module: nn.Module, dtype: torch.dtype) -> None:
    """Round what stays unquantised to the dtype it is stored in, so that reloading is exact."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def attach_config(
    model: PreTrainedModel, recipe: Recipe, formats: Mapping[str, AnyFormat]
) -> SaltireConfig:
    """Tell transformers how the model is quantised, so that it saves and loads itself."""
    layers: dict[str, dict[str, Any]] = {name: f.to_dict() for name, f in formats.items()}
    config = SaltireConfig(
        layers, recipe=recipe.name, rest_dtype=recipe.rest_dtype, kv_bits=recipe.kv_bits
    )
    model.config.quantization_config = config
    model.hf_quantizer = SaltireHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
    return config
