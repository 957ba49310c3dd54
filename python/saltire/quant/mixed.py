"""Mixed precision: bits for every group of linears out of one budget, where the loss minds most.

A group (q, k, v; o; gate, up; down) has one format, as it reads one input.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saltire.errors import SaltireError
from saltire.models.adapters import Adapter
from saltire.processes import sum_over_all, world_size
from saltire.progress import track
from saltire.quant.blocks import BlockRunner
from saltire.quant.gptq import choose_grid
from saltire.quant.layer import check_activations, finite_linear, full_names
from saltire.quant.recipe import Recipe
from saltire.quant.transforms.start import channel_power

# (weight bits, group) from small to large. 3 bits lie in containers of 4: they save nothing.
FORMATS = ((2, 64), (4, 0), (4, 64), (8, 0))
SCALE_BYTES = {0: 4, 64: 2}  # of float32 and float16 scales
MOST_TOKENS = 1024  # of the text that gradients are taken on
REST_BYTES = 2  # of a value that is not quantised
SCALE_BITS = 0.25  # a value of head and embedding, of the float16 that 64 share


@dataclass(frozen=True)
class GroupCost:
    """What a group costs. weights: how many. minds: by how much the loss rises, in nats a token, if
    rounding loses all of the weights' power. bytes: of each format of FORMATS, None where it does
    not fit."""

    weights: int
    minds: float
    bytes: tuple[int | None, ...]

    @classmethod
    def of(cls, linears: list[nn.Linear], minds: float) -> GroupCost:
        K = linears[0].in_features
        N = sum(linear.out_features for linear in linears)
        sizes = tuple(
            None if group and K % group else N * K * bits // 8 + N * (K // (group or K)) * scale
            for (bits, group), scale in ((f, SCALE_BYTES[f[1]]) for f in FORMATS)
        )
        return cls(N * K, minds, sizes)

    def steps(self) -> list[tuple[int, float, int]]:
        """(bytes, rise of the loss, format) of the formats on the lower convex hull."""
        hull: list[tuple[int, float, int]] = []
        for index, size in enumerate(self.bytes):
            if size is None:
                continue
            point = (size, self.minds * lost_power(*FORMATS[index]), index)
            while hull and point[0] <= hull[-1][0]:
                hull.pop()
            while len(hull) > 1 and _slope(hull[-1], point) <= _slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(point)
        return hull


@functools.cache
def lost_power(bits: int, group: int) -> float:
    """The share of its power that a Gaussian matrix loses to a grid: what a rotated weight is like.
    GPTQ then moves all of them down alike."""
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    grid = choose_grid(w, torch.ones(1024), bits, group, False, torch.float32)
    return float((grid.values(grid.codes(w)) - w).square().sum() / w.square().sum())


def deal(groups: Mapping[str, GroupCost], budget: int) -> dict[str, tuple[int, int]]:
    """The format of every group within ``budget`` bytes, the loss rising least.

    Greedy by rise per byte along each group's convex hull, which is optimal but for the last step.
    Raises SaltireError with the least budget if this is under it.
    """
    steps = {name: group.steps() for name, group in groups.items()}
    least = sum(step[0][0] for step in steps.values())
    if budget < least:
        weights = sum(group.weights for group in groups.values())
        raise SaltireError(
            f"a budget of {8 * budget / weights:.3f} bits a weight; 2-bit weights in groups of 64 "
            f"take {8 * least / weights:.3f} with their scales. Give at least so many."
        )
    left, at = budget - least, dict.fromkeys(steps, 0)
    heap = [(_slope(*step[:2]), name) for name, step in steps.items() if len(step) > 1]
    heapq.heapify(heap)
    while heap:
        _, name = heapq.heappop(heap)
        here = at[name]
        cost = steps[name][here + 1][0] - steps[name][here][0]
        if cost > left:
            continue
        left -= cost
        at[name] += 1
        if here + 2 < len(steps[name]):
            heapq.heappush(heap, (_slope(*steps[name][here + 1 : here + 3]), name))
    return {name: FORMATS[step[at[name]][2]] for name, step in steps.items()}


def mixed_recipes(
    model: PreTrainedModel, adapter: Adapter, tokens: Tensor, batch: int, recipe: Recipe
) -> dict[str, Recipe]:
    """The recipe of every group, by the full name of its first linear, within the recipe's budget.

    Measures how much the loss minds noise at every output (the mean square of its gradient, as
    Fisher's information has it) and how much noise a rounded weight makes there.
    """
    gradients = output_gradients(model, adapter, tokens)
    runner = BlockRunner(model, adapter, tokens, batch)
    costs: dict[str, GroupCost] = {}
    for index, block in enumerate(track(adapter.blocks(model), "measuring sensitivity")):
        for group in adapter.groups:
            x = runner.inputs_of(block, group[0])
            prefix = f"{adapter.blocks_path}.{index}"
            check_activations(x, full_names(prefix, group))
            linears = [finite_linear(block, name, prefix) for name in group]
            grads = torch.cat([gradients[f"{prefix}.{name}"] for name in group])
            costs[f"{prefix}.{group[0]}"] = GroupCost.of(linears, _minds(x, linears, grads))
        runner.advance(block)
    chosen = deal(costs, budget_bytes(model, adapter, recipe, costs))
    return {
        name: replace(recipe, weight_bits=bits, group=group)
        for name, (bits, group) in chosen.items()
    }


def budget_bytes(
    model: PreTrainedModel, adapter: Adapter, recipe: Recipe, costs: Mapping[str, GroupCost]
) -> int:
    """What the linears of the blocks may take: the recipe's bits a weight, or what its megabytes
    leave beside embedding, norms and head."""
    weights = sum(cost.weights for cost in costs.values())
    if recipe.bits_per_weight:
        return int(recipe.bits_per_weight * weights / 8)
    whole = sum(parameter.numel() for parameter in model.parameters())  # a tied tensor counts once
    head = model.get_submodule(adapter.head_path).weight
    tied = head is model.get_input_embeddings().weight
    rest = (whole - weights - (0 if tied or not recipe.rounds_head else head.numel())) * REST_BYTES
    if recipe.rounds_head:
        rest += int(head.numel() * (recipe.head_bits + SCALE_BITS) / 8)
    if recipe.rounds_embedding(tied):
        values = model.get_input_embeddings().weight.numel()
        rest -= int(values * (REST_BYTES - (recipe.embedding_bits + SCALE_BITS) / 8))
    return int(recipe.budget_mb * 1e6) - rest


def output_gradients(model: PreTrainedModel, adapter: Adapter, tokens: Tensor) -> dict[str, Tensor]:
    """Mean square, over tokens, of the gradient of the loss of a token by each output: [N]."""
    sums: dict[str, Tensor] = {}
    names = adapter.linear_names(model)

    def keep(name: str) -> object:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            def add(gradient: Tensor) -> None:
                square = gradient.flatten(0, -2).float().square().sum(0)
                sums[name] = sums.get(name, torch.zeros_like(square)) + square

            output.register_hook(add)

        return hook

    def begin(_: nn.Module, __: object, output: Tensor) -> None:
        output.requires_grad_()  # gradients are wanted of activations alone

    wanted = {p: p.requires_grad for p in model.parameters()}
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    handles.append(model.get_input_embeddings().register_forward_hook(begin))
    count = 0
    try:
        model.requires_grad_(False)
        for sample in tokens[: max(1, MOST_TOKENS // tokens.shape[1])]:
            sample = sample[:MOST_TOKENS]
            with torch.enable_grad():
                logits = model(sample[None], use_cache=False).logits[0, :-1].float()
                nn.functional.cross_entropy(logits, sample[1:], reduction="sum").backward()
            count += len(sample) - 1
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in wanted.items():
            parameter.requires_grad_(value)
    count *= world_size()
    return {name: sum_over_all(total) / count for name, total in sums.items()}


def _minds(x: Tensor, linears: list[nn.Linear], gradients: Tensor) -> float:
    """½ Σ_n E[g_n²] · noise_n, noise_n the power of an output's error if all of the weight's power
    were lost to independent errors, after BDQ's diagonal and a rotation have spread both sides."""
    rms_x = channel_power(x).sqrt()
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    rms_w = weight.square().mean(0).sqrt()
    K = weight.shape[1]
    alive = (rms_x > 0) & (rms_w > 0)
    ratio = torch.where(alive, rms_x / rms_w.clamp_min(1e-30), torch.zeros_like(rms_x))
    noise = (weight.square() @ ratio) * (rms_x * rms_w).sum() / K
    return 0.5 * float((gradients * noise).sum())


def _slope(a: tuple[int, float, int], b: tuple[int, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
