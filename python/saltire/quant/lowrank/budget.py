"""Ranks for every layer out of one budget of bytes: the error falls fastest where it is spent."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saltire.errors import SaltireError
from saltire.models.adapters import Adapter
from saltire.ops.lowbit_gemm import CONTAINER_BITS
from saltire.progress import track
from saltire.quant.blocks import BlockRunner
from saltire.quant.layer import check_activations, finite_linear, full_names
from saltire.quant.lowrank.factored import RANK_MULTIPLE
from saltire.quant.lowrank.truncation import Statistics, spectrum

SCALE_BYTES = 4


@dataclass(frozen=True)
class LayerSpectrum:
    """A linear of N outputs and K inputs. power: of its outputs by rank, falling, float64
    [min(N, K)], as shares of its whole."""

    N: int
    K: int
    power: Tensor

    def w4_bytes(self) -> int:
        """The weight at 4 bits with a scale an output."""
        return self.N * self.K // 2 + self.N * SCALE_BYTES

    def whole_bytes(self, bits: int) -> int:
        return _weight_bytes(self.N, self.K, bits)

    def factored_bytes(self, rank: int, bits: int) -> int:
        return _weight_bytes(rank, self.K, bits) + _weight_bytes(self.N, rank, bits)

    def branch_bytes(self, rank: int, bits: int) -> int:
        """Factors of a branch beside a whole weight, with their scales."""
        scales = (rank + self.N) * SCALE_BYTES if bits < 16 else 0
        return rank * (self.N + self.K) * bits // 8 + scales

    def options(self, bits: int) -> list[tuple[int, float, int | None]]:
        """(bytes, share of power lost, rank) of every rank whose factors are smaller than the
        weight, and of the whole weight (None), on the lower convex hull."""
        lost = (self.power.sum() - self.power.cumsum(0)).clamp_min(0).tolist()
        whole = self.whole_bytes(bits)
        points: list[tuple[int, float, int | None]] = [
            (self.factored_bytes(rank, bits), lost[rank - 1], rank)
            for rank in range(RANK_MULTIPLE, len(lost) + 1, RANK_MULTIPLE)
            if self.factored_bytes(rank, bits) < whole
        ]
        return _lower_hull([*points, (whole, 0.0, None)])


def _weight_bytes(N: int, K: int, bits: int) -> int:
    return N * K * CONTAINER_BITS[bits] // 8 + N * SCALE_BYTES


def _lower_hull(
    points: list[tuple[int, float, int | None]],
) -> list[tuple[int, float, int | None]]:
    hull: list[tuple[int, float, int | None]] = []
    for point in points:
        while len(hull) >= 2 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[int, float, int | None], b: tuple[int, float, int | None]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def allocate(layers: Mapping[str, LayerSpectrum], share: float, bits: int) -> dict[str, int | None]:
    """The rank of every layer (None: kept whole) under ``share`` of the layers' bytes at 4 bits.

    Greedy by error per byte along each layer's convex hull, which is optimal but for the last step.
    Raises SaltireError with the least possible share if the budget is under that.
    """
    options = {name: layer.options(bits) for name, layer in layers.items()}
    w4 = sum(layer.w4_bytes() for layer in layers.values())
    left = share * w4 - sum(choice[0][0] for choice in options.values())
    if left < 0:
        least = sum(choice[0][0] for choice in options.values()) / w4
        raise SaltireError(
            f"share = {share}: factors of rank {RANK_MULTIPLE}, the least, take "
            f"{least:.4f} of the bytes at 4 bits. Give a share of at least {least + 5e-5:.4f}."
        )
    at = dict.fromkeys(options, 0)
    heap = [(_slope(*choice[:2]), name) for name, choice in options.items() if len(choice) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        choice, here = options[name], at[name]
        cost = choice[here + 1][0] - choice[here][0]
        if cost > left:
            continue
        left -= cost
        at[name] = here + 1
        if here + 2 < len(choice):
            heapq.heappush(heap, (_slope(choice[here + 1], choice[here + 2]), name))
    return {name: choice[at[name]][2] for name, choice in options.items()}


def branch_ranks(
    layers: Mapping[str, LayerSpectrum], share: float, bits: int, branch_bits: int, group: int
) -> dict[str, int]:
    """Ranks of residual branches that fill the budget, each layer spending alike per weight.

    Raises SaltireError with the least possible share if the weights alone take more.
    """
    step = 8
    w4 = sum(layer.w4_bytes() for layer in layers.values())
    scale_bytes = {
        name: layer.N * (layer.K // group) * 2 - layer.N * SCALE_BYTES if group else 0
        for name, layer in layers.items()
    }
    base = sum(layer.whole_bytes(bits) + scale_bytes[name] for name, layer in layers.items())

    def ranks(per_weight: float) -> dict[str, int]:
        return {
            name: min(
                min(layer.N, layer.K) // step * step,
                int(per_weight * layer.N * layer.K / (layer.N + layer.K)) // step * step,
            )
            for name, layer in layers.items()
        }

    def total(chosen: dict[str, int]) -> int:
        return base + sum(
            layers[name].branch_bytes(rank, branch_bits) for name, rank in chosen.items() if rank
        )

    least = base / w4
    if share < least:
        raise SaltireError(
            f"share = {share}: the {bits}-bit weights alone take {least:.4f} of the bytes at 4 "
            f"bits. Give a share above {least + 5e-5:.4f}."
        )
    low, high = 0.0, 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if total(ranks(middle)) <= share * w4 else (low, middle)
    return ranks(low)


@torch.no_grad()
def spectra(
    model: PreTrainedModel, adapter: Adapter, tokens: Tensor, batch: int
) -> dict[str, LayerSpectrum]:
    """The spectra of every linear in the blocks, by full name, on the inputs that tokens give."""
    runner = BlockRunner(model, adapter, tokens, batch)
    found = {}
    for index, block in enumerate(track(adapter.blocks(model), "measuring ranks")):
        for group in adapter.groups:
            x = runner.inputs_of(block, group[0])
            path = f"{adapter.blocks_path}.{index}"
            check_activations(x, full_names(path, group))
            statistics = Statistics.of(x)
            for name in group:
                linear = finite_linear(block, name, path)
                found[f"{path}.{name}"] = _spectrum(linear, statistics)
        runner.advance(block)
    return found


def _spectrum(linear: nn.Linear, statistics: Statistics) -> LayerSpectrum:
    power = spectrum(linear.weight.detach(), statistics).square()
    whole = power.sum()
    N, K = linear.out_features, linear.in_features
    return LayerSpectrum(N, K, power / whole if whole > 0 else power)
