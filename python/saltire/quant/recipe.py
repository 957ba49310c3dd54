"""Recipes: what quantisation does to every layer, as a frozen value with a name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Literal, get_args

from saltire.errors import SaltireError
from saltire.models.kv_rounding import UNROUNDED, check_kv_bits
from saltire.nn.linear_format import LinearFormat

Rotation = Literal["none", "block", "full"]
Gauge = Literal["down", "up", "balanced", "closed", "learned", "hadamard", "learned-hadamard"]
GAUGES: tuple[Gauge, ...] = get_args(Gauge)
BRANCH_BITS = (4, 8, 16)


@dataclass(frozen=True)
class LowRank:
    """How low-rank decomposition joins in (docs/dam.md).

    kind: ``factored``, two quantised factors in place of a weight; ``residual``, a quantised weight
    and a branch of low rank for what it lost. share: bytes of all linears of the blocks over what
    they take at 4 bits a weight and one float32 scale an output. gauge: what stands between the
    factors, folded into both (``lowrank.dam.apply_gauge``). quantise_first: decompose the quantised
    weight, to show what that costs. branch_bits: of the residual's factors, 4, 8 or 16.
    """

    kind: Literal["factored", "residual"]
    share: float
    gauge: Gauge = "hadamard"
    quantise_first: bool = False
    branch_bits: int = 4

    def __post_init__(self) -> None:
        if self.kind not in ("factored", "residual"):
            raise SaltireError(f"kind = {self.kind!r}; expected factored or residual.")
        if not self.share > 0:
            raise SaltireError(f"share = {self.share}; expected a share of W4's bytes above 0.")
        if self.gauge not in GAUGES:
            raise SaltireError(f"gauge = {self.gauge!r}; expected one of {', '.join(GAUGES)}.")
        if self.branch_bits not in BRANCH_BITS:
            raise SaltireError(f"branch_bits = {self.branch_bits}; expected 4, 8 or 16.")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised.

    weight_bits, act_bits, group, zero_points: see LinearFormat. diagonal: scale input channels by
    BDQ's closed form before rounding. rotation: ``none``; ``block``, a Hadamard of ``block``
    channels; ``full``, one rotation over all channels. head: also quantise the head that gives the
    logits, to 4-bit weights in groups of 64 (where they fit) on 8-bit activations. rest_dtype:
    dtype in which the tensors that are not quantised (embedding, norms) are stored. low_rank: join
    it with a low-rank decomposition of the linears in the blocks. kv_bits: of the keys and values
    that the model keeps: 8, 4 or 2, or 16 for as they come.
    """

    name: str
    weight_bits: int
    act_bits: int
    group: int = 0
    zero_points: bool = False
    diagonal: bool = True
    rotation: Rotation = "full"
    block: int = 64
    head: bool = True
    rest_dtype: str = "bfloat16"
    low_rank: LowRank | None = None
    kv_bits: int = UNROUNDED

    def __post_init__(self) -> None:
        check_kv_bits(self.kv_bits)
        if self.rotation not in ("none", "block", "full"):
            raise SaltireError(f"rotation = {self.rotation!r}; expected none, block or full.")
        self.format()  # refuses bits and groups that no kernel has

    def format(self, hadamard: int = 1, left: int = 0, clip: float = 1.0) -> LinearFormat:
        """The format of one layer under this recipe, with the rotation chosen for it."""
        return LinearFormat(
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            group=self.group,
            zero_points=self.zero_points,
            scale_dtype="float16" if self.group else "float32",
            diag=self.diagonal,
            hadamard=hadamard,
            left=left,
            clip=clip,
        )

    def between_factors(self) -> Recipe:
        """How the second of two factors is quantised: what would balance and rotate its inputs, the
        ranks, is folded into both factors, so nothing is left to do when it runs."""
        return replace(self, diagonal=False, rotation="none")

    def head_recipe(self, inputs: int) -> Recipe:
        """How a head of so many inputs is quantised: gently, as its noise goes to the logits."""
        group = 64 if inputs % 64 == 0 else 0
        return replace(self, weight_bits=4, act_bits=8, group=group, zero_points=False)


_BASE = Recipe("w4a4", 4, 4)
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _BASE,
        replace(_BASE, name="w4a4-g128", group=128),
        replace(_BASE, name="w4a4kv4", kv_bits=4),
        replace(_BASE, name="w4a8", act_bits=8),
        replace(_BASE, name="w3a4", weight_bits=3),
        replace(_BASE, name="w2a4", weight_bits=2),
        replace(_BASE, name="w2a4-g64", weight_bits=2, group=64),
        replace(_BASE, name="w2a8", weight_bits=2, act_bits=8),
        replace(_BASE, name="w2a8-g64", weight_bits=2, act_bits=8, group=64),
        replace(_BASE, name="dam-80", low_rank=LowRank("factored", 0.8)),
        replace(_BASE, name="dam-60", low_rank=LowRank("factored", 0.6)),
        replace(_BASE, name="dam-40", low_rank=LowRank("factored", 0.4)),
        replace(_BASE, name="w4a4-lr", low_rank=LowRank("residual", 1.25)),
        replace(_BASE, name="w2a4-lr", weight_bits=2, low_rank=LowRank("residual", 0.8)),
        replace(
            _BASE, name="w2a8-lr", weight_bits=2, act_bits=8, low_rank=LowRank("residual", 0.8)
        ),
    )
}


def parse_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name; SaltireError names the nearest ones."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, RECIPES, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(RECIPES)}."
        raise SaltireError(f"unknown recipe {recipe!r}. {hint}")
    return RECIPES[recipe]
