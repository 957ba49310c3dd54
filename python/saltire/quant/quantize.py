"""Quantise a whole model, block after block, with activations of the blocks already quantised."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saltire import ops
from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for, share_inputs
from saltire.models.hf_quantizer import SaltireConfig, SaltireHfQuantizer, replace_linear
from saltire.nn.linear_format import SCALE_DTYPES, LinearFormat
from saltire.nn.quant_linear import QuantLinear
from saltire.progress import track
from saltire.quant.blocks import BlockRunner
from saltire.quant.gptq import choose_grid, compensated_weight, gptq
from saltire.quant.recipe import Recipe, parse_recipe
from saltire.quant.texts import calibration_tokens
from saltire.quant.transforms import input_diagonal, rotation

DAMPING = 0.01  # of the mean diagonal of H: GPTQ's usual
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
MOMENT_CHUNK = 2048  # tokens whose codes are held as floats at once


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
    runner = BlockRunner(model, adapter, tokens[:usable], batch)
    formats: dict[str, LinearFormat] = {}
    for index, block in enumerate(track(adapter.blocks(model), f"quantising to {recipe.name}")):
        for group in adapter.groups:
            x = runner.inputs_of(block, group[0])
            for name, new in quantize_group(block, group, x, recipe).items():
                formats[f"{adapter.blocks_path}.{index}.{name}"] = new.format
        runner.advance(block)
    _round_the_rest(model, getattr(torch, recipe.rest_dtype))
    _attach_config(model, recipe, formats)
    share_inputs(model)
    return model


def quantize_group(
    block: nn.Module, names: tuple[str, ...], x: Tensor, recipe: Recipe
) -> dict[str, QuantLinear]:
    """Quantise linears that share the input x float32 [tokens, K], and put them into the block."""
    where = " / ".join(names)
    if not torch.isfinite(x).all():
        raise SaltireError(
            f"{where}: the calibration activations hold NaN or infinity. "
            "Check the model and the calibration text."
        )
    linears = [block.get_submodule(name) for name in names]
    weights = {
        name: linear.weight.detach().float()
        for name, linear in zip(names, linears, strict=True)
        if isinstance(linear, nn.Linear)
    }
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise SaltireError(f"{name}: the weight holds NaN or infinity. The model is damaged.")
    K = x.shape[1]
    hadamard, left = rotation(K, recipe)
    D = _diagonal(x, list(weights.values())) if recipe.diagonal else torch.ones(K).double()
    left32 = None if left is None else left.float()
    inverse = (1.0 / D).float()
    rotated = ops.transform(x, diag=inverse, hadamard=hadamard, left=left32)
    format = recipe.format(hadamard, 0 if left is None else left.shape[0])
    format = replace(format, clip=_best_clip(rotated, format))
    format.check_fits(where, K)
    H, cross = _moments(rotated, format)
    if H.diagonal().max() == 0:
        # An input that is always zero teaches nothing: round to nearest, as if all were alike.
        H, cross = torch.eye(K), torch.eye(K)
    new = {}
    for name, weight in weights.items():
        rotated_weight = ops.transform(weight, diag=D.float(), hadamard=hadamard, left=left32)
        new[name] = _quantize_one(block, name, rotated_weight, H, cross, format, recipe)
        if format.diag:
            new[name].diag = inverse.clone()
        if left32 is not None:
            new[name].left = left32.clone()
    return new


def _quantize_one(
    block: nn.Module,
    name: str,
    w: Tensor,
    H: Tensor,
    cross: Tensor,
    format: LinearFormat,
    recipe: Recipe,
) -> QuantLinear:
    """Round one rotated weight and put its QuantLinear into the block; fills all but transforms."""
    dtype = SCALE_DTYPES[format.scale_dtype]
    if recipe.compensate:
        w = compensated_weight(w, H, cross, DAMPING).float()
    grid = choose_grid(w, H.diagonal(), format.weight_bits, format.group, format.zero_points, dtype)
    codes = gptq(w, H, grid, format.group, DAMPING)
    bias = block.get_submodule(name).bias
    new = replace_linear(block, name, format)
    new.weight_packed = ops.pack_weight(codes, format.weight_bits)
    new.weight_scale = grid.scale.to(dtype)
    if format.zero_points:
        new.weight_zero = grid.zero.to(dtype)
    if isinstance(bias, Tensor):
        new.bias = bias.detach().float()
    return new


def _diagonal(x: Tensor, weights: list[Tensor]) -> Tensor:
    rms_x = x.square().mean(0).sqrt()
    rms_w = torch.cat(weights).square().mean(0).sqrt()
    return input_diagonal(rms_x, rms_w)


def _best_clip(rotated: Tensor, format: LinearFormat) -> float:
    """The clip ratio with the least squared rounding error, on at most 1,024 tokens."""
    if format.act_bits == 8:
        return 1.0  # 8 bits have levels to spare: clipping only costs
    probe = rotated[:: max(1, rotated.shape[0] // 1024)]

    def loss(clip: float) -> float:
        return float((_rounded(probe, replace(format, clip=clip)) - probe).square().sum())

    return min(CLIPS, key=loss)


def _rounded(rotated: Tensor, format: LinearFormat) -> Tensor:
    codes, scale, _ = ops.transform_quantize(rotated, format.act_bits, clip=format.clip)
    return codes.float() * scale[:, None]


def _moments(rotated: Tensor, format: LinearFormat) -> tuple[Tensor, Tensor]:
    """X̂ᵀX̂ and X̂ᵀX over all tokens, X̂ the rounded activations: float32 [K, K] each."""
    K = rotated.shape[1]
    H, cross = torch.zeros(K, K), torch.zeros(K, K)
    for x in rotated.split(MOMENT_CHUNK):
        rounded = _rounded(x, format)
        H.addmm_(rounded.T, rounded)
        cross.addmm_(rounded.T, x)
    return H, cross


def _round_the_rest(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round what stays unquantised to the dtype it is stored in, so that reloading is exact."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def _attach_config(
    model: PreTrainedModel, recipe: Recipe, formats: dict[str, LinearFormat]
) -> None:
    layers = {name: format.to_dict() for name, format in formats.items()}
    config = SaltireConfig(layers, recipe=recipe.name, rest_dtype=recipe.rest_dtype)
    model.config.quantization_config = config
    model.hf_quantizer = SaltireHfQuantizer(config, pre_quantized=True)
    model.is_quantized = True
    model.quantization_method = config.quant_method
