"""Quantising linears that share one input: diagonal, rotation, clip, grid, GPTQ."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from saltire import ops
from saltire.errors import SaltireError
from saltire.models.hf_quantizer import replace_linear
from saltire.nn.linear_format import SCALE_DTYPES, LinearFormat
from saltire.nn.quant_linear import QuantLinear
from saltire.quant.gptq import Curvature, choose_grid, gptq
from saltire.quant.recipe import Recipe
from saltire.quant.transforms import input_diagonal, rotation

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
MOMENT_CHUNK = 2048  # tokens whose codes are held as floats at once
ROWS_AT_ONCE = 8192  # outputs rounded at once: a head has too many for memory


def quantize_group(
    parent: nn.Module, names: tuple[str, ...], x: Tensor, recipe: Recipe
) -> dict[str, QuantLinear]:
    """Quantise linears of ``parent`` that share the input x, and put them in place.

    x: float32 [tokens, K], what enters them in the model quantised so far. They get one transform
    (its diagonal balances x against all of them), one clip ratio, and grids of their own. Returns
    name -> new layer. Raises SaltireError for activations or weights that are not finite.
    """
    where = " / ".join(names)
    if not torch.isfinite(x).all():
        raise SaltireError(
            f"{where}: the calibration activations hold NaN or infinity. "
            "Check the model and the calibration text."
        )
    linears = {name: _linear(parent, name) for name in names}
    weight = torch.cat([linear.weight.detach().float() for linear in linears.values()])
    K = x.shape[1]
    hadamard, left64 = rotation(K, recipe)
    left = None if left64 is None else left64.float()
    D = _diagonal(x, weight) if recipe.diagonal else torch.ones(K)
    format = recipe.format(hadamard, 0 if left is None else left.shape[0])
    format.check_fits(where, K)

    rotated = ops.transform(x, diag=1.0 / D, hadamard=hadamard, left=left)
    format = replace(format, clip=best_clip(rotated, format))
    curvature = Curvature.of(second_moment(rotated, format))
    codes, scale, zero = [], [], []
    for rows in weight.split(ROWS_AT_ONCE):
        w = ops.transform(rows, diag=D, hadamard=hadamard, left=left)
        dtype = SCALE_DTYPES[format.scale_dtype]
        grid = choose_grid(
            w, curvature.power, format.weight_bits, format.group, format.zero_points, dtype
        )
        codes.append(ops.pack_weight(gptq(w, curvature, grid, format.group), format.weight_bits))
        scale.append(grid.scale.to(dtype))
        zero.append(grid.zero.to(dtype))

    sizes = [linear.out_features for linear in linears.values()]
    parts = zip(
        names, *(torch.cat(rows).split(sizes) for rows in (codes, scale, zero)), strict=True
    )
    made = {}
    for name, name_codes, name_scale, name_zero in parts:
        bias = linears[name].bias
        new = made[name] = replace_linear(parent, name, format)
        new.weight_packed, new.weight_scale = name_codes.clone(), name_scale.clone()
        new.weight_zero = name_zero.clone() if format.zero_points else None
        new.diag = 1.0 / D if format.diag else None
        new.left = None if left is None else left.clone()
        new.bias = None if bias is None else bias.detach().float()
    return made


def best_clip(rotated: Tensor, format: LinearFormat) -> float:
    """The clip ratio with the least squared rounding error, on at most 1,024 tokens."""
    if format.act_bits == 8:
        return 1.0  # 8 bits have levels to spare: clipping only costs
    probe = rotated[:: max(1, rotated.shape[0] // 1024)]

    def loss(clip: float) -> float:
        return float((_rounded(probe, replace(format, clip=clip)) - probe).square().sum())

    return min(CLIPS, key=loss)


def second_moment(rotated: Tensor, format: LinearFormat) -> Tensor:
    """X̂ᵀX̂ over all tokens, X̂ the rounded activations: float32 [K, K]."""
    K = rotated.shape[1]
    H = torch.zeros(K, K)
    for x in rotated.split(MOMENT_CHUNK):
        rounded = _rounded(x, format)
        H.addmm_(rounded.T, rounded)
    return H


def _linear(parent: nn.Module, name: str) -> nn.Linear:
    linear = parent.get_submodule(name)
    if not isinstance(linear, nn.Linear):
        raise SaltireError(f"{name} is a {type(linear).__name__}; expected a linear layer.")
    if not torch.isfinite(linear.weight).all():
        raise SaltireError(f"{name}: the weight holds NaN or infinity. The model is damaged.")
    return linear


def _diagonal(x: Tensor, weight: Tensor) -> Tensor:
    rms_x = x.square().mean(0).sqrt()
    rms_w = weight.square().mean(0).sqrt()
    return input_diagonal(rms_x, rms_w).float()


def _rounded(rotated: Tensor, format: LinearFormat) -> Tensor:
    codes, scale, _ = ops.transform_quantize(rotated, format.act_bits, clip=format.clip)
    return codes.float() * scale[:, None]
