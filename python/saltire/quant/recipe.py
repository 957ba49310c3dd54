"""A recipe: what quantisation does to every layer, as a frozen value with a name."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

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
        plain = self.transform == "bdq" and self.low_rank is None
        return plain and self.kv_bits != UNROUNDED

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
