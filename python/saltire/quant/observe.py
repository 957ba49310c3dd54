"""What quantising a block did to its linears: flatness, largest channels, error, and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saltire import ops
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.quant_linear import QuantLinear
from saltire.quant.blocks import BlockRunner
from saltire.quant.flatness import flatness_entropy, flatness_meanabs

MOST_TOKENS = 1024  # of the first batch that are looked at
SIDE = 64  # cells of a picture along each side, at most
LOUDEST = 5  # channels that are named


@dataclass(frozen=True)
class MatrixView:
    """A matrix seen from afar. entropy, meanabs: see ``quant.flatness``, nats; NaN for a matrix of
    zeros, which is neither flat nor not. cells: largest magnitudes of its cells over its root mean
    square, float32 [rows, columns]. channels: the columns of the largest root mean square, and that
    over the matrix's."""

    entropy: float
    meanabs: float
    cells: Tensor
    channels: list[tuple[int, float]]

    @classmethod
    def of(cls, matrix: Tensor) -> MatrixView:
        magnitude = matrix.detach().float().abs()
        rms = float(magnitude.square().mean().sqrt()) or 1.0
        by_channel = magnitude.square().mean(0).sqrt() / rms
        values, places = by_channel.topk(min(LOUDEST, len(by_channel)))
        rows, columns = (min(SIDE, size) for size in magnitude.shape)
        cells = nn.functional.adaptive_max_pool2d(magnitude[None], (rows, columns))[0] / rms
        channels = list(zip(places.tolist(), values.tolist(), strict=True))
        meanabs = flatness_meanabs(matrix) if magnitude.any() else math.nan
        return cls(flatness_entropy(matrix), meanabs, cells, channels)


@dataclass(frozen=True)
class LinearView:
    """One linear before and after. error: ‖y − ŷ∘s‖ / ‖y‖ of its outputs on the same text, s the
    best scale of each output channel, as a transform may have scaled it; of values, which may also
    have been turned, the best linear map of each head. weight_bits, act_bits: what it got; 0 where
    it is not a plain quantised layer."""

    block: int
    name: str
    weight_bits: int
    act_bits: int
    error: float
    weight: tuple[MatrixView, MatrixView]
    activation: tuple[MatrixView, MatrixView]


@dataclass(frozen=True)
class BlockView:
    """One block. error: of what it adds to the hidden states, relative to that; NaN if it added
    nothing before and something after."""

    block: int
    error: float


@dataclass
class _Seen:
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    added: Tensor | None = None


class Views:
    """An observer (``quant.quantize.Observer``) that collects views of all blocks."""

    def __init__(self) -> None:
        self.linears: list[LinearView] = []
        self.blocks: list[BlockView] = []
        self._weights: dict[str, MatrixView] = {}
        self._before = _Seen()

    def before(self, index: int, block: nn.Module, runner: BlockRunner) -> None:
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        self._weights = {name: MatrixView.of(linear.weight) for name, linear in linears.items()}
        self._before = _look(block, linears, runner)

    def after(self, index: int, block: nn.Module, runner: BlockRunner) -> None:
        linears = {name: block.get_submodule(name) for name in self._weights}
        now = _look(block, linears, runner)
        attention: Any = block.get_submodule("self_attn")
        head_dim = int(attention.head_dim)
        for name, linear in linears.items():
            x, y = self._before.inputs[name], self._before.outputs[name]
            first = linear.down if isinstance(linear, FactoredQuantLinear) else linear
            weight, activation = self._weights[name], MatrixView.of(x)
            bits = (0, 0)
            seen_weight, seen_x = weight, MatrixView.of(now.inputs[name])
            if isinstance(first, QuantLinear):
                seen_weight = MatrixView.of(first.dequantized_weight())
                seen_x = MatrixView.of(_transformed(first, now.inputs[name]))
                bits = (first.format.weight_bits, first.format.act_bits)
            self.linears.append(
                LinearView(
                    index,
                    name,
                    *bits,
                    _error(y, now.outputs[name], head_dim if name.endswith("v_proj") else 1),
                    (weight, seen_weight),
                    (activation, seen_x),
                )
            )
        assert self._before.added is not None
        assert now.added is not None
        self.blocks.append(BlockView(index, _share_lost(self._before.added, now.added)))
        self._before, self._weights = _Seen(), {}


def _look(block: nn.Module, linears: Mapping[str, nn.Module], runner: BlockRunner) -> _Seen:
    """One batch through the block, keeping what enters and leaves the linears."""
    seen = _Seen()

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen.inputs[name] = args[0].detach().flatten(0, -2)[:MOST_TOKENS].float()
            seen.outputs[name] = output.detach().flatten(0, -2)[:MOST_TOKENS].float()

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in linears.items()]
    try:
        seen.added = (runner.run(block, 0).float() - runner.hidden[0]).detach()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _transformed(layer: QuantLinear, x: Tensor) -> Tensor:
    f = layer.format
    return ops.transform(
        x, diag=layer.diag, hadamard=f.hadamard, left=layer.left, right=layer.right
    )


def _share_lost(was: Tensor, now: Tensor) -> float:
    """‖now − was‖ / ‖was‖; 0 for two zeros, NaN for a zero that has become something."""
    lost, size = float((now - was).norm()), float(was.norm())
    if size == 0.0:
        return math.nan if lost else 0.0
    return lost / size


def _error(y: Tensor, other: Tensor, width: int) -> float:
    """What is left of y once ``width`` outputs at a time are mapped onto it as well as can be."""
    y, other = (t.unflatten(-1, (-1, width)).transpose(0, 1).double() for t in (y, other))
    gram = other.mT @ other
    ridge = 1e-9 * gram.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float64).tiny
    gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    best = torch.linalg.solve(gram, other.mT @ y)
    return float((y - other @ best).norm() / y.norm().clamp_min(torch.finfo(torch.float64).tiny))
