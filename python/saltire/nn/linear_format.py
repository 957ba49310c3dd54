"""How one linear layer is quantised: a small frozen value that checkpoints store as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from saltire.errors import SaltireError
from saltire.nn.quant_embedding import EmbeddingFormat

WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (3, 4, 8)
GROUPS = (0, 32, 64, 128)
RANK_BITS = (4, 8, 16, 32)
SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class LinearFormat:
    """The format of one quantised linear layer with K inputs.

    weight_bits: 2, 3, 4 or 8. act_bits: 3, 4 or 8. group: inputs that share a weight scale; 0 means
    one scale an output channel. zero_points: weights have their own zero per scale; else symmetric.
    scale_dtype: of the weight scales. diag: the input is multiplied by a learned diagonal.
    hadamard: block size of the Hadamard rotation, 1 for none. left, right: sizes of the dense
    rotation factors, 0 for none (``saltire.ops.transform_quantize`` defines both). clip: share of
    a token's largest magnitude that the activation grid covers. rank: of the low-rank branch.
    rank_bits: of the branch's stored factors; 4 and 8 are integers with a scale a row. bias: the
    layer has a bias even where the original has none.
    """

    weight_bits: int = 4
    act_bits: int = 4
    group: int = 0
    zero_points: bool = False
    scale_dtype: str = "float32"
    diag: bool = False
    hadamard: int = 1
    left: int = 0
    right: int = 0
    clip: float = 1.0
    rank: int = 0
    rank_bits: int = 32
    bias: bool = False

    def __post_init__(self) -> None:
        _require("weight_bits", self.weight_bits, WEIGHT_BITS)
        _require("act_bits", self.act_bits, ACTIVATION_BITS)
        _require("group", self.group, GROUPS)
        _require("rank_bits", self.rank_bits, RANK_BITS)
        _require("scale_dtype", self.scale_dtype, tuple(SCALE_DTYPES))
        if self.hadamard < 1 or self.hadamard & (self.hadamard - 1):
            raise SaltireError(f"hadamard = {self.hadamard}; expected a power of two (1 for none).")
        if not 0.0 < self.clip <= 1.0:
            raise SaltireError(f"clip = {self.clip}; expected a ratio in (0, 1].")
        if min(self.left, self.right, self.rank) < 0:
            raise SaltireError("left, right and rank must not be negative; 0 means none.")
        if self.rank_bits == 4 and self.rank % 2:
            raise SaltireError(f"rank = {self.rank}; 4-bit factors need an even one.")

    def check_fits(self, name: str, in_features: int) -> None:
        """Raise SaltireError unless a layer with ``in_features`` inputs can have this format."""
        K = in_features
        if K % 32:
            raise SaltireError(
                f"{name}: K = {K} inputs; expected a multiple of 32. "
                "Saltire's kernels cannot run this layer."
            )
        if self.group and K % self.group:
            fitting = " or ".join(str(group) for group in GROUPS if group and K % group == 0)
            raise SaltireError(
                f"{name}: K = {K} inputs cannot be cut into group blocks of {self.group}. Kernels "
                f"have groups of {', '.join(map(str, GROUPS[1:]))}; choose {fitting}, or 0 for one "
                "scale an output channel."
            )
        for what, size in (
            ("hadamard", self.hadamard),
            ("right", self.right),
        ):
            if size and K % size:
                raise SaltireError(
                    f"{name}: K = {K} inputs cannot be cut into {what} blocks of {size}. "
                    f"Choose a {what} size that divides {K}."
                )
        block = self.right or self.hadamard
        if self.left and self.left * block != K:
            raise SaltireError(
                f"{name}: left ({self.left}) times the block ({block}) is {self.left * block}; "
                f"expected K = {K}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearFormat:
        """The inverse of ``to_dict``; an unknown field is refused by name."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise SaltireError(
                f"the layer format has unknown fields {unknown}; this version of saltire knows "
                f"{sorted(known)}. Upgrade saltire to read it."
            )
        return cls(**values)


@dataclass(frozen=True)
class FactoredFormat:
    """The format of a linear layer of two factors: ``down`` to ``rank`` values, ``up`` from it."""

    rank: int
    down: LinearFormat
    up: LinearFormat

    def check_fits(self, name: str, in_features: int) -> None:
        """Raise SaltireError unless a layer with ``in_features`` inputs can have this format."""
        if self.down.rank or self.up.rank:
            raise SaltireError(
                f"{name}: factors have no branch of low rank; expected rank 0 in both."
            )
        self.down.check_fits(f"{name}.down", in_features)
        self.up.check_fits(f"{name}.up", self.rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FactoredFormat:
        """The inverse of ``to_dict``; an unknown field is refused by name."""
        unknown = sorted(set(values) - {"rank", "down", "up"})
        if unknown or len(values) != 3 or not isinstance(values.get("rank"), int):
            raise SaltireError(
                f"the format of a factored layer has the fields {sorted(values)}; expected rank, "
                "down and up. The checkpoint is damaged, or newer than this saltire."
            )
        down, up = (LinearFormat.from_dict(values[part]) for part in ("down", "up"))
        return cls(values["rank"], down, up)


AnyFormat = LinearFormat | FactoredFormat | EmbeddingFormat


def read_format(values: Mapping[str, Any]) -> AnyFormat:
    """The format that plain JSON values stand for."""
    if "embedding_bits" in values:
        return EmbeddingFormat.from_dict(values)
    return (FactoredFormat if "down" in values else LinearFormat).from_dict(values)


def _require(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise SaltireError(f"{name} = {value!r}; expected one of {list(allowed)}.")
