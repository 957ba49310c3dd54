"""Quantise a whole model, block after block, with activations of the blocks already quantised."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for, share_inputs
from saltire.models.hf_quantizer import SaltireConfig, SaltireHfQuantizer
from saltire.models.kv_rounding import set_kv_bits
from saltire.nn.linear_format import AnyFormat
from saltire.nn.quant_linear import QuantLinear
from saltire.progress import track
from saltire.quant.blocks import BlockRunner
from saltire.quant.layer import quantize_group
from saltire.quant.lowrank.compress import group_method
from saltire.quant.recipe import Recipe, parse_recipe
from saltire.quant.texts import calibration_tokens


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
) -> PreTrainedModel:
    """Quantise the linears of every block in place; returns the model.

    calibration: ``"self"`` (text sampled from the model), a ``.txt`` or ``.jsonl`` file, a Hugging
    Face dataset, or tokens int64 [samples, length]. batch: samples run at once. Afterwards
    ``model.save_pretrained`` writes packed integers. Raises SaltireError for an unsupported
    architecture, a model already quantised, or unusable calibration.
    """
    recipe = parse_recipe(recipe)
    adapter = adapter_for(model.config)
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise SaltireError("the model is already quantised. Start from the original model.")
    tokens = (
        calibration
        if isinstance(calibration, Tensor)
        else calibration_tokens(
            calibration, model, tokenizer, samples=samples, length=length, seed=seed
        )
    )
    usable = tokens.shape[0] // batch * batch or tokens.shape[0]  # batches of one shape
    model.eval()
    set_kv_bits(model, recipe.kv_bits)
    method = group_method(model, adapter, tokens[:usable], batch, recipe)
    runner = BlockRunner(model, adapter, tokens[:usable], batch)
    formats: dict[str, AnyFormat] = {}
    for index, block in enumerate(track(adapter.blocks(model), f"quantising to {recipe.name}")):
        for group in adapter.groups:
            x = runner.inputs_of(block, group[0])
            path = f"{adapter.blocks_path}.{index}"
            for name, new in method(block, path, group, x).items():
                formats[f"{path}.{name}"] = new.format
        runner.advance(block)
    if recipe.head:
        x = runner.outputs(model.get_submodule(adapter.norm_path))
        head = quantize_group(model, (adapter.head_path,), x, recipe.head_recipe(x.shape[1]))
        formats[adapter.head_path] = head[adapter.head_path].format
        model.config.tie_word_embeddings = False
    _round_the_rest(model, getattr(torch, recipe.rest_dtype))
    _attach_config(model, recipe, formats)
    share_inputs(model)
    return model


def _round_the_rest(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round what stays unquantised to the dtype it is stored in, so that reloading is exact."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _attach_config(model: PreTrainedModel, recipe: Recipe, formats: dict[str, AnyFormat]) -> None:
    layers = {name: format.to_dict() for name, format in formats.items()}
    config = SaltireConfig(
        layers, recipe=recipe.name, rest_dtype=recipe.rest_dtype, kv_bits=recipe.kv_bits
    )
    model.config.quantization_config = config
    model.hf_quantizer = SaltireHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
