"""DEPT: baselines that notice when self-play is stuck in one outcome, and push it out.

Per role, a fast and a slow moving average of the reward; per game, the entropy of how its matches
end. While the averages agree and one outcome dominates, the baseline moves from the slow average to
an asymmetric value: the best the role has known for the dominant outcome, the worst for any other.

    b_fast <- f b_fast + (1 - f) mean R,   b_slow <- s b_slow + (1 - s) mean R
    sigma  = 1 - tanh(|b_fast - b_slow| / scale)
    lambda = sigma sqrt(1 - H),            H = match entropy / log K in [0, 1]
    A      = R - ((1 - lambda) b_slow + lambda V),   V = V_max if the outcome dominates else V_min

Source: "Breaking the Impasse" (arXiv 2605.08721). Where it is silent we chose: averages move once
per batch by the role's mean and are read before they move; outcomes are labels of matches; H is
normalised by the K outcomes that the game can have; running extremes start at 0 with the averages;
matches with a forfeit change neither averages nor entropy, so that a penalty below the worst result
never becomes V_min, and are valued as the dominant outcome, so that breaking the format never earns
more than losing. Advantages are never re-centred: their mean is the push.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from saltire.errors import SaltireError
from saltire.rl.match_outcome import MatchOutcome, sum_over_ranks


@dataclass(frozen=True)
class DeptConfig:
    """fast and slow: weight of the past in each average, in [0, 1); scale: divergence at which
    sigma is 1 - tanh 1; margin: if given, V_max is at least this far above the role's mean reward
    in the dominant outcome and V_min as far below: a push where the extremes give none.
    """

    fast: float = 0.5
    slow: float = 0.95
    scale: float = 1.0
    margin: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.fast < self.slow < 1:
            raise SaltireError(
                f"DEPT: 0 <= fast < slow < 1 is needed; fast is {self.fast}, slow {self.slow}."
            )
        if not self.scale > 0:
            raise SaltireError(f"DEPT: scale must be positive; it is {self.scale}.")
        if self.margin is not None and self.margin < 0:
            raise SaltireError(f"DEPT: margin must be at least 0; it is {self.margin}.")


@dataclass
class RoleBaselines:
    """Moving averages of one role's reward, and the extremes that the fast one has reached."""

    fast: float = 0.0
    slow: float = 0.0
    highest: float = 0.0
    lowest: float = 0.0

    def update(self, mean: float, config: DeptConfig) -> None:
        """Move both averages towards a batch's ``mean`` reward."""
        self.fast = config.fast * self.fast + (1 - config.fast) * mean
        self.slow = config.slow * self.slow + (1 - config.slow) * mean
        self.highest = max(self.highest, self.fast)
        self.lowest = min(self.lowest, self.fast)


def match_entropy(counts: Sequence[float]) -> float:
    """Entropy of how matches end over log K, in [0, 1]; counts: one per possible outcome, K >= 2.

    Without any match it is 1: nothing is known to dominate.
    """
    total = sum(counts)
    if total == 0:
        return 1.0
    shares = [count / total for count in counts if count > 0]
    return max(0.0, -sum(p * math.log(p) for p in shares)) / math.log(len(counts))


def stagnation(baselines: RoleBaselines, scale: float = 1.0) -> float:
    """sigma = 1 - tanh(|b_fast - b_slow| / scale), in (0, 1]: 1 while the averages agree."""
    return 1.0 - math.tanh(abs(baselines.fast - baselines.slow) / scale)


def impasse(sigma: float, entropy: float) -> float:
    """lambda = sigma sqrt(1 - H), in [0, 1]: how far the baseline moves to the asymmetric value."""
    return sigma * math.sqrt(max(0.0, 1.0 - entropy))


def shaped_advantage(reward: float, slow: float, weight: float, value: float) -> float:
    """R - ((1 - lambda) b_slow + lambda V)."""
    return reward - ((1.0 - weight) * slow + weight * value)


@dataclass
class Dept:
    """DEPT's advantages over declared games; one state for all of them.

    outcomes and roles: every label and role that each game can produce (``Game.outcomes`` and
    ``Game.roles``); declared, because K normalises the entropy and all ranks must agree on it.
    reduce: sums a vector over ranks.
    """

    outcomes: Mapping[str, Sequence[str]]
    roles: Mapping[str, Sequence[str]]
    config: DeptConfig = field(default_factory=DeptConfig)
    reduce: Callable[[list[float]], list[float]] = sum_over_ranks

    def __post_init__(self) -> None:
        for game, labels in self.outcomes.items():
            if len(set(labels)) < 2:
                raise SaltireError(
                    f"DEPT: {game} can end in {len(set(labels))} way; an impasse is only defined "
                    "for a game with at least two outcomes."
                )
            if not self.roles.get(game):
                raise SaltireError(f"DEPT: no roles are declared for {game}.")
        self.baselines = {key: RoleBaselines() for key in self._role_keys()}
        self._report: dict[str, float] = {}

    def advantages(self, matches: Sequence[MatchOutcome]) -> list[tuple[float, ...]]:
        """A per match and player, from the averages as they were before this batch; then they move.

        Raises SaltireError for a game, role or outcome that was not declared.
        """
        tally = self._tally(matches)
        self._report = {}
        pushes: dict[tuple[str, str], _Push] = {}
        for game, labels in self.outcomes.items():
            counts = [tally.matches[game, label] for label in labels]
            entropy, dominant = match_entropy(counts), labels[counts.index(max(counts))]
            self._report[f"dept/{game}/entropy"] = entropy
            for label, count in zip(labels, counts, strict=True):
                self._report[f"dept/{game}/share {label}"] = count / max(sum(counts), 1.0)
            for role in self.roles[game]:
                push = self._push(game, role, dominant, entropy, tally)
                pushes[game, role] = push
                self._log(game, role, push)
        result = [
            tuple(
                self._advantage(match, reward, pushes[match.game, role])
                for role, reward in zip(match.roles, match.rewards, strict=True)
            )
            for match in matches
        ]
        for (game, role), baselines in self.baselines.items():
            mean = tally.mean_reward(game, role, self.outcomes[game])
            if mean is not None:
                baselines.update(mean, self.config)
        return result

    def report(self) -> dict[str, float]:
        """Baselines, divergence, sigma, lambda and extremes per role; entropy and shares per game,
        as used for the last batch."""
        return dict(self._report)

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "roles": [[*key, asdict(self.baselines[key])] for key in self._role_keys()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        try:
            config = DeptConfig(**state["config"])
            loaded = {
                (str(game), str(role)): RoleBaselines(**{k: float(v) for k, v in values.items()})
                for game, role, values in state["roles"]
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SaltireError(f"DEPT: the saved state is not one of DEPT's ({error}).") from error
        if config != self.config or set(loaded) != set(self.baselines):
            raise SaltireError(
                f"DEPT: the saved state is of {sorted(loaded)} with {config}; this run has "
                f"{sorted(self.baselines)} with {self.config}. Resume with the same settings."
            )
        self.baselines = loaded

    def _push(self, game: str, role: str, dominant: str, entropy: float, tally: _Tally) -> _Push:
        baselines, margin = self.baselines[game, role], self.config.margin
        sigma = stagnation(baselines, self.config.scale)
        highest, lowest = baselines.highest, baselines.lowest
        reward = tally.mean_reward(game, role, [dominant])
        if margin is not None and reward is not None:
            highest, lowest = max(highest, reward + margin), min(lowest, reward - margin)
        return _Push(dominant, sigma, impasse(sigma, entropy), highest, lowest, baselines.slow)

    @staticmethod
    def _advantage(match: MatchOutcome, reward: float, push: _Push) -> float:
        expected = match.forfeits or match.outcome == push.dominant
        value = push.highest if expected else push.lowest
        return shaped_advantage(reward, push.slow, push.weight, value)

    def _log(self, game: str, role: str, push: _Push) -> None:
        baselines = self.baselines[game, role]
        for name, value in (
            ("fast", baselines.fast),
            ("slow", baselines.slow),
            ("divergence", abs(baselines.fast - baselines.slow)),
            ("sigma", push.sigma),
            ("lambda", push.weight),
            ("highest", push.highest),
            ("lowest", push.lowest),
        ):
            self._report[f"dept/{game}/{role}/{name}"] = value

    def _role_keys(self) -> list[tuple[str, str]]:
        return [(game, role) for game in sorted(self.outcomes) for role in self.roles[game]]

    def _tally(self, matches: Sequence[MatchOutcome]) -> _Tally:
        """What all ranks together saw, without the matches that a forfeit ended."""
        tally = _Tally()
        for match in matches:
            self._check(match)
            if match.forfeits:
                continue
            tally.matches[match.game, match.outcome] += 1
            for role, reward in zip(match.roles, match.rewards, strict=True):
                tally.players[match.game, role, match.outcome] += 1
                tally.rewards[match.game, role, match.outcome] += reward
        ends = [(game, label) for game in sorted(self.outcomes) for label in self.outcomes[game]]
        seats = [(g, role, label) for g, role in self._role_keys() for label in self.outcomes[g]]
        total = self.reduce(
            [tally.matches[key] for key in ends]
            + [tally.players[key] for key in seats]
            + [tally.rewards[key] for key in seats]
        )
        first, second = len(ends), len(ends) + len(seats)
        return _Tally(
            _totals(ends, total[:first]),
            _totals(seats, total[first:second]),
            _totals(seats, total[second:]),
        )

    def _check(self, match: MatchOutcome) -> None:
        if match.game not in self.outcomes:
            raise SaltireError(
                f"DEPT: a match of {match.game!r} came; declared are {sorted(self.outcomes)}."
            )
        if match.outcome not in self.outcomes[match.game]:
            raise SaltireError(
                f"DEPT: {match.game} ended with {match.outcome!r}; its outcomes are "
                f"{list(self.outcomes[match.game])}."
            )
        unknown = set(match.roles) - set(self.roles[match.game])
        if unknown or len(match.roles) != len(match.rewards):
            raise SaltireError(
                f"DEPT: a match of {match.game} has roles {match.roles} and {len(match.rewards)} "
                f"rewards; one reward is needed for each role, of {list(self.roles[match.game])}."
            )


@dataclass(frozen=True)
class _Push:
    """What shapes one role's advantages in one batch."""

    dominant: str
    sigma: float
    weight: float
    highest: float
    lowest: float
    slow: float


Key = TypeVar("Key")


def _zeros() -> defaultdict[Any, float]:
    return defaultdict(float)


def _totals(keys: Sequence[Key], values: Sequence[float]) -> defaultdict[Key, float]:
    return defaultdict(float, zip(keys, values, strict=True))


@dataclass
class _Tally:
    """Matches per (game, outcome); players and their summed rewards per (game, role, outcome)."""

    matches: defaultdict[tuple[str, str], float] = field(default_factory=_zeros)
    players: defaultdict[tuple[str, str, str], float] = field(default_factory=_zeros)
    rewards: defaultdict[tuple[str, str, str], float] = field(default_factory=_zeros)

    def mean_reward(self, game: str, role: str, outcomes: Sequence[str]) -> float | None:
        """A role's mean reward over ``outcomes``; None if it never played to one of them."""
        count = sum(self.players[game, role, label] for label in outcomes)
        return sum(self.rewards[game, role, label] for label in outcomes) / count if count else None
