"""How the next token is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saltire import ops
from saltire.errors import SaltireError


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy (the first of equals); then top_k, top_p and min_p have no effect.

    top_k: 0 keeps all. repetition_penalty: logits of tokens seen before are divided by it where
    positive, multiplied where negative (CTRL). seed: of the counter-based random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "a share in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "a share in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0 (1 for none)"),
            ("seed", 0 <= self.seed < 1 << 63, "0 to 2^63 - 1"),
        ):
            if not good:
                raise SaltireError(f"{name} = {getattr(self, name)}; expected {expected}.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Warped distributions of logits f32 [M, V]."""
        return ops.warp_logits(logits, self.temperature, self.top_k, self.top_p, self.min_p)

    def penalise(self, logits: Tensor, histories: Sequence[Sequence[int]]) -> Tensor:
        """Apply the repetition penalty in place: row m of logits knows ``histories[m]``."""
        if self.repetition_penalty == 1.0:
            return logits
        for row, history in zip(logits, histories, strict=True):
            seen = torch.tensor(list(set(history)), dtype=torch.int64)
            values = row[seen]
            row[seen] = torch.where(
                values > 0, values / self.repetition_penalty, values * self.repetition_penalty
            )
        return logits
