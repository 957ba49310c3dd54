"""The advantages that DEPT is compared with: one average per role, groups, and none."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from saltire.errors import SaltireError
from saltire.rl.match_outcome import MatchOutcome, sum_over_ranks


@dataclass
class RoleAverage:
    """A = R - b, with one moving average b of the reward per game and role, read before it moves.

    Source: role-conditioned advantage estimation of SPIRAL, decay 0.95 from 0; here b moves once
    per batch by the role's mean over all ranks. roles: every role of each game.
    """

    roles: dict[str, Sequence[str]]
    decay: float = 0.95
    reduce: Callable[[list[float]], list[float]] = sum_over_ranks
    averages: dict[tuple[str, str], float] = field(init=False)

    def __post_init__(self) -> None:
        self.averages = {(g, role): 0.0 for g in sorted(self.roles) for role in self.roles[g]}

    def advantages(self, matches: Sequence[MatchOutcome]) -> list[tuple[float, ...]]:
        result = [
            tuple(r - self.averages[match.game, role] for role, r in _players(match))
            for match in matches
        ]
        sums: dict[tuple[str, str], float] = defaultdict(float)
        counts: dict[tuple[str, str], float] = defaultdict(float)
        for match in matches:
            for role, reward in _players(match):
                sums[match.game, role] += reward
                counts[match.game, role] += 1
        keys = list(self.averages)
        total = self.reduce([sums[key] for key in keys] + [counts[key] for key in keys])
        for key, reward, count in zip(keys, total[: len(keys)], total[len(keys) :], strict=True):
            if count:
                self.averages[key] += (1 - self.decay) * (reward / count - self.averages[key])
        return result

    def report(self) -> dict[str, float]:
        return {f"rae/{game}/{role}/average": b for (game, role), b in self.averages.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "averages": [[*key, b] for key, b in self.averages.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        loaded = {(game, role): float(b) for game, role, b in state.get("averages", [])}
        if set(loaded) != set(self.averages) or state.get("decay") != self.decay:
            raise SaltireError(
                f"the saved averages are of {sorted(loaded)} with decay {state.get('decay')}; this "
                f"run has {sorted(self.averages)} with {self.decay}. Resume with the same settings."
            )
        self.averages = loaded


@dataclass
class RoleGroup:
    """A = (R - mean) / (std + 1e-6) within each game and role of the batch, as GRPO does it.

    Statistics are of this rank's batch, as are GRPO's groups; nothing is kept between batches.
    """

    normalise: bool = True

    def advantages(self, matches: Sequence[MatchOutcome]) -> list[tuple[float, ...]]:
        groups: dict[tuple[str, str], list[float]] = defaultdict(list)
        for match in matches:
            for role, reward in _players(match):
                groups[match.game, role].append(reward)
        mean = {key: sum(rewards) / len(rewards) for key, rewards in groups.items()}
        scale = {
            key: math.sqrt(sum((r - mean[key]) ** 2 for r in rewards) / len(rewards)) + 1e-6
            if self.normalise
            else 1.0
            for key, rewards in groups.items()
        }
        return [
            tuple((r - mean[m.game, role]) / scale[m.game, role] for role, r in _players(m))
            for m in matches
        ]

    def report(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@dataclass
class NoBaseline:
    """A = R."""

    def advantages(self, matches: Sequence[MatchOutcome]) -> list[tuple[float, ...]]:
        return [match.rewards for match in matches]

    def report(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _players(match: MatchOutcome) -> list[tuple[str, float]]:
    return list(zip(match.roles, match.rewards, strict=True))
