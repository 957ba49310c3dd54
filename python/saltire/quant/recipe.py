"""Recipes: what quantisation does to every layer, as a frozen value with a name."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from saltire.errors import SaltireError
from saltire.models.kv_rounding import UNROUNDED, check_kv_bits
from saltire.nn.linear_format import LinearFormat
from saltire.nn.quant_embedding import EMBEDDING_BITS
from saltire.quant.learning.losses import LOSSES, Loss

TransformName = Literal["none", "smooth", "hadamard", "kronecker", "bdq"]
TRANSFORMS: tuple[TransformName, ...] = get_args(TransformName)
Rotation = Literal["none", "block", "full"]
Gauge = Literal["down", "up", "balanced", "closed", "learned", "hadamard", "learned-hadamard"]
GAUGES: tuple[Gauge, ...] = get_args(Gauge)
BRANCH_BITS = (4, 8, 16)
HEAD_BITS = (4, 8)
REST_DTYPES = ("bfloat16", "float16", "float32")
MOST_BLOCK = 4096  # channels of one Hadamard; more would cost more than it mixes
KRONECKER_STEPS = 100  # FlatQuant's start is a random rotation: nothing without its learning
T = TypeVar("T", bound="LowRank | Learning | Recipe")


def _require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise SaltireError(f"{name} = {value!r}; expected one of {', '.join(map(str, allowed))}.")


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
        _require("kind", self.kind, ("factored", "residual"))
        if not 0 < self.share < math.inf:
            raise SaltireError(f"share = {self.share}; expected a share of W4's bytes above 0.")
        _require("gauge", self.gauge, GAUGES)
        _require("branch_bits", self.branch_bits, BRANCH_BITS)


@dataclass(frozen=True)
class Learning:
    """What is learned, and for how long.

    group_steps: steps by which each transform is moved to lessen the error of its linears' outputs
    (0: the closed form stays); group_rate: of AdamW. epochs: passes over the calibration text that
    learn scales, diagonals and biases end to end against the unquantised model (0: none); rate: of
    AdamW; loss: ``learning.losses``.
    """

    group_steps: int = 0
    group_rate: float = 5e-3
    epochs: int = 0
    rate: float = 2e-3
    loss: Loss = "kl"

    def __post_init__(self) -> None:
        _require("loss", self.loss, tuple(LOSSES))
        for name in ("group_steps", "epochs"):
            if getattr(self, name) < 0:
                raise SaltireError(f"{name} = {getattr(self, name)}; expected 0 (none) or more.")
        for name in ("group_rate", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise SaltireError(f"{name} = {getattr(self, name)}; expected a rate above 0.")


@dataclass(frozen=True)
class Recipe:
    """How a model is quantised.

    weight_bits, act_bits, group, zero_points: see LinearFormat. transform: what is done to inputs
    before they are rounded, and undone in the weights (``transforms.Transform``). turn: of ``bdq``,
    turn each head's values into principal directions first, offline (``transforms.values``).
    rotation: of ``hadamard`` and ``bdq``: ``none``; ``block``, a Hadamard of ``block`` channels;
    ``full``, one rotation over all. clip: shrink the ranges of activations and weights where that
    loses less. learning: what is learned after the closed forms; ``kronecker`` is nothing without,
    so it learns by groups for KRONECKER_STEPS where no steps are given. head_bits: of the head that
    gives the logits: 4 (in groups of 64 where they fit) or 8, on 8-bit activations, or 16 for as it
    is. rest_dtype: in which the tensors that are not quantised (norms) are stored, of REST_DTYPES.
    embedding_bits: 8 or 4, or 16 for ``rest_dtype``; an embedding that is the head too stays if the
    head does. low_rank: join it with a low-rank decomposition of the linears in the blocks.
    kv_bits: of the keys and values that the model keeps: 8, 4 or 2, or 16 for as they come.
    bits_per_weight: deal out 2, 4 and 8 bits to the linears of the blocks within so many on
    average, scales counted; budget_mb: within so many megabytes of all weights (``mixed``); 0: all
    alike.
    """

    name: str
    weight_bits: int
    act_bits: int
    group: int = 0
    zero_points: bool = False
    transform: TransformName = "bdq"
    turn: bool = True
    rotation: Rotation = "full"
    block: int = 64
    clip: bool = True
    head_bits: int = 4
    rest_dtype: str = "bfloat16"
    embedding_bits: int = 8
    low_rank: LowRank | None = None
    kv_bits: int = UNROUNDED
    bits_per_weight: float = 0.0
    budget_mb: float = 0.0
    learning: Learning | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise SaltireError(f"name = {self.name!r}; expected some text.")
        for field, kind in (("learning", Learning), ("low_rank", LowRank)):
            value = getattr(self, field)
            if value is not None and not isinstance(value, kind):
                raise SaltireError(
                    f"{field} = {value!r}; expected a {kind.__name__} (in YAML a mapping of "
                    f"{', '.join(known.name for known in fields(kind))}), or nothing."
                )
        check_kv_bits(self.kv_bits)
        for field, known in (("embedding_bits", EMBEDDING_BITS), ("head_bits", HEAD_BITS)):
            if getattr(self, field) not in (*known, UNROUNDED):
                raise SaltireError(
                    f"{field} = {getattr(self, field)!r}; expected 16, or one of "
                    f"{', '.join(map(str, known))}."
                )
        _require("transform", self.transform, TRANSFORMS)
        _require("rotation", self.rotation, get_args(Rotation))
        _require("rest_dtype", self.rest_dtype, REST_DTYPES)
        if self.block not in (2**power for power in range(MOST_BLOCK.bit_length())):
            raise SaltireError(
                f"block = {self.block!r}; expected a power of two of at most {MOST_BLOCK}."
            )
        if not math.isfinite(self.bits_per_weight) or not math.isfinite(self.budget_mb):
            raise SaltireError(
                f"bits_per_weight = {self.bits_per_weight}, budget_mb = {self.budget_mb}; expected "
                "finite numbers."
            )
        if self.mixed and (
            min(self.bits_per_weight, self.budget_mb) < 0
            or (self.bits_per_weight and self.budget_mb)
            or self.low_rank is not None
        ):
            raise SaltireError(
                f"bits_per_weight = {self.bits_per_weight}, budget_mb = {self.budget_mb}; expected "
                "one of them, above 0, and no low rank, which has a budget of its own."
            )
        self.format()  # refuses bits and groups that no kernel has
        if self.transform == "kronecker" and not (self.learning and self.learning.group_steps):
            learning = replace(self.learning or Learning(), group_steps=KRONECKER_STEPS)
            object.__setattr__(self, "learning", learning)  # frozen, but not yet out of our hands

    @property
    def turns_values(self) -> bool:
        """Whether each block's values are turned before it is quantised."""
        return self.turn and self.transform == "bdq" and self.low_rank is None

    @property
    def balances_keys(self) -> bool:
        """Whether queries and keys are evened out first, for a cache that rounds keys."""
        return self.turns_values and self.kv_bits != UNROUNDED

    @property
    def rounds_head(self) -> bool:
        """Whether the head is quantised."""
        return self.head_bits != UNROUNDED

    def rounds_embedding(self, tied: bool) -> bool:
        """Whether the embedding is rounded, given whether it is the head as well."""
        return self.embedding_bits != UNROUNDED and (self.rounds_head or not tied)

    @property
    def mixed(self) -> bool:
        """Whether bits are dealt out of a budget."""
        return bool(self.bits_per_weight or self.budget_mb)

    def format(
        self, hadamard: int = 1, left: int = 0, right: int = 0, clip: float = 1.0
    ) -> LinearFormat:
        """The format of one layer under this recipe, with the rotation chosen for it."""
        return LinearFormat(
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            group=self.group,
            zero_points=self.zero_points,
            scale_dtype="float16" if self.group else "float32",
            diag=self.transform in ("smooth", "kronecker", "bdq"),
            hadamard=hadamard,
            left=left,
            right=right,
            clip=clip,
        )

    def between_factors(self) -> Recipe:
        """How the second of two factors is quantised: what would balance and rotate its inputs, the
        ranks, is folded into both factors, so nothing is left to do when it runs."""
        return replace(self, transform="none", learning=None)

    def head_recipe(self, inputs: int) -> Recipe:
        """How a head of so many inputs is quantised: gently, as its noise goes to the logits, and
        in closed form, as its outputs are too many to learn from."""
        bits = self.head_bits
        group = 64 if bits == 4 and inputs % 64 == 0 else 0
        transform = "bdq" if self.transform == "kronecker" else self.transform
        return replace(
            self,
            transform=transform,
            learning=None,
            weight_bits=bits,
            act_bits=8,
            group=group,
            zero_points=False,
        )


@dataclass(frozen=True)
class Effort:
    """What ``--effort`` stands for. samples: of the calibration text, where no number is given:
    what is learned is as good as its text is long. learning: beside that by groups, which
    ``kronecker`` does at every effort."""

    samples: int
    learning: Learning | None = None


EFFORTS = {
    "fast": Effort(16),
    "normal": Effort(128, Learning(epochs=2)),
    "best": Effort(256, Learning(group_steps=30, epochs=4)),
}

_BASE = Recipe("w4a4", 4, 4)
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _BASE,
        replace(_BASE, name="w4a4-g128", group=128),
        replace(_BASE, name="w4a4kv4", kv_bits=4),
        replace(_BASE, name="w4a8", act_bits=8),
        replace(_BASE, name="w8a8", weight_bits=8, act_bits=8, head_bits=8),
        replace(_BASE, name="w3a4", weight_bits=3),
        replace(_BASE, name="w3a3", weight_bits=3, act_bits=3),
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
    """A recipe by name, or from a .yaml file; SaltireError names the nearest ones."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe.endswith((".yaml", ".yml")):
        return read_recipe(Path(recipe))
    if recipe not in RECIPES:
        near = difflib.get_close_matches(recipe, RECIPES, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(RECIPES)}."
        raise SaltireError(f"unknown recipe {recipe!r}. {hint}")
    return RECIPES[recipe]


def with_effort(recipe: Recipe, effort: str) -> Recipe:
    """The recipe with what an effort learns: ``fast`` closed forms only; ``normal`` and ``best``
    also learn. ``kronecker`` keeps its steps by groups at every effort, or takes those of the
    effort where they are more. SaltireError for another name."""
    if effort not in EFFORTS:
        raise SaltireError(f"effort = {effort!r}; expected one of {', '.join(EFFORTS)}.")
    learning, old = EFFORTS[effort].learning, recipe.learning
    if recipe.transform == "kronecker" and old is not None:
        new = learning or Learning()
        steps = max(new.group_steps, old.group_steps)
        learning = replace(new, group_steps=steps, group_rate=old.group_rate)
    return replace(recipe, learning=learning)


def with_transform(recipe: Recipe, transform: str) -> Recipe:
    """The recipe with another transform of the family; ``kronecker`` gets FlatQuant's learning
    where the recipe learns nothing by groups (see Recipe). SaltireError for an unknown name."""
    if transform not in TRANSFORMS:
        raise SaltireError(f"transform = {transform!r}; expected one of {', '.join(TRANSFORMS)}.")
    return replace(recipe, transform=transform)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file: ``base``, a known name, and fields of Recipe to change.

    ``learning`` and ``low_rank`` are mappings of the fields of Learning and LowRank. Raises
    SaltireError for a file that is missing or no mapping, and for a field by its name.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SaltireError(f"cannot read the recipe {path}: {error}".splitlines()[0]) from None
    if not isinstance(values, dict):
        raise SaltireError(f"{path} holds no mapping; expected lines like 'weight_bits: 4'.")
    base = parse_recipe(str(values.pop("base", "w4a4")))
    for name, kind in (("learning", Learning), ("low_rank", LowRank)):
        if isinstance(values.get(name), dict):
            values[name] = _build(kind, values[name], f"{path}, {name}")
    return _build(Recipe, {**_fields(base), "name": path.stem, **values}, str(path))


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {field.name: getattr(recipe, field.name) for field in fields(recipe)}


def _build(kind: type[T], values: dict[Any, Any], where: str) -> T:
    """Make a dataclass from what YAML gave. Fields that are plain values have their own type, an
    int passing for a float; SaltireError names the file and the field."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise SaltireError(f"{where}: unknown field {name!r}; known: {', '.join(hints)}.")
        wanted = str if get_origin(hints[name]) is Literal else hints[name]
        if wanted is float and type(value) is int:
            continue
        if wanted in (bool, int, float, str) and type(value) is not wanted:
            raise SaltireError(f"{where}: {name} = {value!r}; expected a {wanted.__name__}.")
    try:
        return kind(**values)
    except (SaltireError, TypeError) as error:
        raise SaltireError(f"{where}: {error}") from None
