"""An embedding whose rows are stored in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError

EMBEDDING_BITS = (4, 8)
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class EmbeddingFormat:
    """value = (code - 2^(bits - 1)) · scale: 8 or 4 bits, a float16 scale for ``group`` values."""

    embedding_bits: int = 8
    group: int = 64

    def __post_init__(self) -> None:
        for name, allowed in (("embedding_bits", EMBEDDING_BITS), ("group", GROUPS)):
            if getattr(self, name) not in allowed:
                raise SaltireError(
                    f"{name} = {getattr(self, name)!r}; expected one of {list(allowed)}."
                )

    @property
    def zero(self) -> int:
        """The code of 0."""
        return 1 << (self.embedding_bits - 1)

    def check_fits(self, name: str, features: int) -> None:
        """Raise SaltireError unless rows of so many values can have this format."""
        if features % self.group:
            raise SaltireError(
                f"{name}: rows of {features} values cannot be cut into groups of {self.group}. "
                "Leave the embedding at 16 bits."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every field."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EmbeddingFormat:
        """The inverse of ``to_dict``; an unknown field is refused by name."""
        unknown = sorted(set(values) - {"embedding_bits", "group"})
        if unknown:
            raise SaltireError(
                f"the format of an embedding has unknown fields {unknown}. Upgrade saltire."
            )
        return cls(**values)


class QuantEmbedding(nn.Module):
    """ids [...] -> rows [..., D] in ``dtype``.

    Buffers: weight_packed uint8 [V, D·bits/8], at 4 bits the even of two values in the low half of
    a byte; weight_scale float16 [V, D/G].
    """

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, format: EmbeddingFormat, dtype: torch.dtype
    ) -> None:
        super().__init__()
        format.check_fits("QuantEmbedding", embedding_dim)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.format, self.dtype = format, dtype
        V, D = num_embeddings, embedding_dim
        packed = torch.zeros(V, D * format.embedding_bits // 8, dtype=torch.uint8)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.zeros(V, D // format.group, dtype=torch.float16))

    def forward(self, ids: Tensor) -> Tensor:
        return self._values(self.weight_packed[ids], self.weight_scale[ids]).to(self.dtype)

    def dequantized(self) -> Tensor:
        """All rows: [V, D] in ``dtype``."""
        return self._values(self.weight_packed, self.weight_scale).to(self.dtype)

    def extra_repr(self) -> str:
        bits, group = self.format.embedding_bits, self.format.group
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={bits}, group={group}"

    def _values(self, packed: Tensor, scale: Tensor) -> Tensor:
        if self.format.embedding_bits == 4:
            packed = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        centred = packed.float() - self.format.zero
        groups = centred.unflatten(-1, (-1, self.format.group))
        return (groups * scale.float()[..., None]).flatten(-2)
