"""What a generation cost and how its drafts fared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class DecodeStats:
    """Counts and seconds of one generation (or, added up, of many).

    offered, accepted: by position in the draft. rounds: by the name of the draft that was used.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    plan_seconds: float = 0.0
    total_seconds: float = 0.0
    plans: int = 0
    offered: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)
    rounds: Counter[str] = field(default_factory=Counter)

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens a verification emits, the one behind the drafts included; plain: 1."""
        first = 1 if self.new_tokens else 0  # drawn from the prefill
        return (self.new_tokens - first) / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> float:
        """Share of the offered drafts that were accepted."""
        offered = sum(self.offered.values())
        return sum(self.accepted.values()) / offered if offered else 0.0

    def add(self, other: DecodeStats) -> None:
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = {k: v for k, v in vars(self).items() if not isinstance(v, Counter)}
        return {
            **values,
            "tokens_per_step": self.tokens_per_step,
            "acceptance": self.acceptance,
            "acceptance_by_position": {
                str(i): self.accepted[i] / n for i, n in sorted(self.offered.items())
            },
            "rounds": dict(self.rounds),
        }
