"""What every advantage of self-play is computed from: how a batch of matches ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class MatchOutcome:
    """One match: its game, its outcome's label, and each player's role and reward.

    forfeits: players whose reward is a penalty for broken format and not a result of play.
    """

    game: str
    outcome: str
    roles: tuple[str, ...]
    rewards: tuple[float, ...]
    forfeits: tuple[int, ...] = ()


class AdvantageEstimator(Protocol):
    """Turns the outcomes of a batch into one advantage per match and player, and learns from it."""

    def advantages(self, matches: Sequence[MatchOutcome]) -> list[tuple[float, ...]]:
        """One advantage per player of every match; uses only what was known before this batch,
        then learns from the batch."""
        ...

    def report(self) -> dict[str, float]:
        """What to log about the last batch, by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as plain numbers and dictionaries."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Raises SaltireError if it belongs to something else."""
        ...


def sum_over_ranks(values: list[float]) -> list[float]:
    """Element-wise sums over all ranks of torch.distributed; ``values`` itself without it.

    float64, so that the order of ranks changes no decision.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    on = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    total = torch.tensor(values, dtype=torch.float64, device=on)
    distributed.all_reduce(total)
    return total.tolist()
