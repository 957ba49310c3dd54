"""Quantising linears that share one input: diagonal, rotation, clip, grid, GPTQ."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from saltire import ops
from saltire.errors import SaltireError
from saltire.nn.linear_format import SCALE_DTYPES, LinearFormat
from saltire.nn.quant_linear import QuantLinear
from saltire.processes import sum_over_all
from saltire.quant.finite import all_finite
from saltire.quant.gptq import Curvature, choose_grid
from saltire.quant.learning.group import Rounding, learn_transform
from saltire.quant.recipe import Recipe
from saltire.quant.transforms import Transform, starting_transform
from saltire.reference.lowbit_gemm import dequantize_weight

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
MOMENT_CHUNK = 2048  # tokens that are held transformed, and as codes, at once
PANEL = 256  # rows of a second moment that are computed in one product
ROWS_AT_ONCE = 8192  # outputs rounded at once: a head has too many for memory


@dataclass(frozen=True)
class InputRounding:
    """How an input is transformed and rounded: all that its weights' rounding needs to know of it.

    transform: of the input, and inversely of the weights; curvature: of the rounded input;
    clip_weights: whether ranges of weights are shrunk where that loses less.
    """

    format: LinearFormat
    transform: Transform
    curvature: Curvature
    clip_weights: bool = True

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, recipe: Recipe, where: str) -> InputRounding:
        """For x, float32 [tokens, K], and the weights that it meets, float32 [N, K]."""
        check_activations(x, where)
        transform = starting_transform(x, weight, recipe)
        sizes = [0 if m is None else len(m) for m in (transform.left, transform.right)]
        format = recipe.format(transform.hadamard, *sizes)
        format.check_fits(where, x.shape[1])
        clip, learning = None, recipe.learning
        if learning is not None and learning.group_steps and recipe.transform != "none":
            clip = best_clip(x, transform, format) if recipe.clip else 1.0
            learned = learn_transform(
                x,
                weight,
                transform,
                Rounding.of(transform, weight, format, recipe, clip),
                steps=learning.group_steps,
                rate=learning.group_rate,
                orthogonal=recipe.transform != "kronecker",
                diagonal=format.diag,
            )
            transform, clip = learned.transform, learned.clip
        if clip is None:
            clip = best_clip(x, transform, format) if recipe.clip else 1.0
        format = replace(format, clip=clip)
        moment = second_moment(x, transform, format)
        return cls(format, transform, Curvature.of(moment), recipe.clip)

    def inputs(self, x: Tensor) -> Tensor:
        """The transformed input before it is rounded: float32 [tokens, K]."""
        return self.transform.inputs(x)

    def weights(self, weight: Tensor) -> Tensor:
        """Weights float32 [N, K] in the basis of the transformed input."""
        return self.transform.weights(weight)

    def back(self, weight: Tensor) -> Tensor:
        """The inverse of ``weights``."""
        return self.transform.back(weight)

    def round(self, weight: Tensor) -> RoundedWeights:
        """Round weights float32 [N, K]: a grid for each output or group, then GPTQ."""
        f, dtype = self.format, SCALE_DTYPES[self.format.scale_dtype]
        packed, scale, zero = [], [], []
        for rows in weight.split(ROWS_AT_ONCE):
            w = self.weights(rows)
            power, clip = self.curvature.power, self.clip_weights
            grid = choose_grid(w, power, f.weight_bits, f.group, f.zero_points, dtype, clip)
            packed.append(ops.pack_weight(self.curvature.round(w, grid), f.weight_bits))
            scale.append(grid.scale.to(dtype))
            zero.append(grid.zero.to(dtype))
        return RoundedWeights(self, torch.cat(packed), torch.cat(scale), torch.cat(zero))


@dataclass(frozen=True)
class RoundedWeights:
    """Rounded weights of linears that share an input, stacked by outputs.

    packed: uint8 [N, K·c/8]; scale, zero: [N, K/G].
    """

    input: InputRounding
    packed: Tensor
    scale: Tensor
    zero: Tensor

    @property
    def format(self) -> LinearFormat:
        return self.input.format

    def layer(self, start: int, stop: int, bias: Tensor | None = None) -> QuantLinear:
        """The quantised linear of outputs [start, stop)."""
        transform = self.input.transform
        new = QuantLinear(transform.channels, stop - start, self.format, bias=bias is not None)
        new.weight_packed = self.packed[start:stop].clone()
        new.weight_scale = self.scale[start:stop].clone()
        new.weight_zero = self.zero[start:stop].clone() if self.format.zero_points else None
        new.diag = 1.0 / transform.diagonal.float() if self.format.diag else None
        new.left = None if transform.left is None else transform.left.float().clone()
        new.right = None if transform.right is None else transform.right.float().clone()
        new.bias = None if bias is None else bias.detach().float()
        return new

    def weight(self) -> Tensor:
        """What the codes stand for, back in the basis of the input: float32 [N, K]."""
        f = self.format
        zero = self.zero if f.zero_points else None
        rotated = dequantize_weight(self.packed, self.scale, zero, f.weight_bits, f.group)
        return self.input.back(rotated.float())


def round_weights(x: Tensor, weight: Tensor, recipe: Recipe, where: str) -> RoundedWeights:
    """Round weights that share the input x: diagonal, rotation, clip, grid, GPTQ.

    x: float32 [tokens, K]. weight: float32 [N, K], the weights of all the linears, stacked; they
    get one transform (its diagonal balances x against all of them) and one clip ratio. where: names
    them in errors. Raises SaltireError for activations that are not finite.
    """
    return InputRounding.of(x, weight, recipe, where).round(weight)


def quantize_group(
    parent: nn.Module, names: tuple[str, ...], x: Tensor, recipe: Recipe, path: str = ""
) -> dict[str, QuantLinear]:
    """Quantise linears of ``parent`` that share the input x, and put them in place.

    x: float32 [tokens, K], what enters them in the model quantised so far. path: of ``parent``, for
    errors. Returns name -> new layer. Raises SaltireError for activations or weights that are not
    finite.
    """
    where = full_names(path, names)
    check_activations(x, where)
    linears = [finite_linear(parent, name, path) for name in names]
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    rounded = round_weights(x, weight, recipe, where)
    made, start = {}, 0
    for name, linear in zip(names, linears, strict=True):
        stop = start + linear.out_features
        made[name] = rounded.layer(start, stop, linear.bias)
        put(parent, name, made[name])
        start = stop
    return made


def full_names(path: str, names: tuple[str, ...]) -> str:
    """Linears of the module at ``path`` ("" for the model itself), as errors name them."""
    return " / ".join(f"{path}.{name}" if path else name for name in names)


def put(parent: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one called ``name``."""
    path, _, child = name.rpartition(".")
    setattr(parent.get_submodule(path), child, new)


def check_activations(x: Tensor, where: str) -> None:
    """Raise SaltireError unless all of x is finite."""
    if not all_finite(x):
        raise SaltireError(
            f"{where}: the calibration activations hold NaN or infinity. "
            "Check the model and the calibration text."
        )


def best_clip(x: Tensor, transform: Transform, format: LinearFormat) -> float:
    """The clip ratio with the least squared rounding error, on some 1,024 tokens."""
    if format.act_bits == 8:
        return 1.0  # 8 bits have levels to spare: clipping only costs
    probe = transform.inputs(x[:: max(1, len(x) // 1024)])

    def loss(clip: float) -> float:
        return float((_rounded(probe, replace(format, clip=clip)) - probe).square().sum())

    losses = sum_over_all(torch.tensor([loss(clip) for clip in CLIPS]))
    return CLIPS[int(losses.argmin())]


def second_moment(x: Tensor, transform: Transform, format: LinearFormat) -> Tensor:
    """X̂ᵀX̂ over the tokens of all processes, X̂ the transformed and rounded activations: float32
    [K, K]. A chunk of tokens at a time, so that they are never held twice."""
    K = x.shape[1]
    H = torch.zeros(K, K)
    for tokens in x.split(MOMENT_CHUNK):
        rounded = _rounded(transform.inputs(tokens), format)
        for start in range(0, K, PANEL):  # H is symmetric: on and right of the diagonal is enough
            panel = rounded[:, start : start + PANEL]
            H[start : start + PANEL, start:].addmm_(panel.T, rounded[:, start:])
    upper = H.triu()
    return sum_over_all(upper + upper.triu(1).T)


def finite_linear(parent: nn.Module, name: str, path: str = "") -> nn.Linear:
    """The linear called ``name``; SaltireError if it is none, or if its weight is not finite. path:
    of ``parent``, for errors."""
    linear, where = parent.get_submodule(name), full_names(path, (name,))
    if not isinstance(linear, nn.Linear):
        raise SaltireError(f"{where} is a {type(linear).__name__}; expected a linear layer.")
    if not all_finite(linear.weight):
        raise SaltireError(f"{where}: the weight holds NaN or infinity. The model is damaged.")
    return linear


def _rounded(rotated: Tensor, format: LinearFormat) -> Tensor:
    codes, scale, _ = ops.transform_quantize(rotated, format.act_bits, clip=format.clip)
    return codes.float() * scale[:, None]
