"""Which draft to use and how long: what is predicted to emit most tokens per unit of time.

All is measured while decoding: the time of a step by its number of rows, the time of a drafted
token, and how often each draft's i-th token survives. One arm is one draft; its length is chosen
anew each round from

    rate(arm, n) = (1 + Σ_{i ≤ n} s_i) / (n · t_draft + t_step(n + 1)),   s_i = Π_{k ≤ i} a_k

with a_k the survival of token k given that of the one before it. Plain decoding is n = 0, so the
fall-back below 1 is part of the choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

PRIOR = 4.0  # rounds that the first guess of an acceptance weighs
MEMORY = 0.98  # weight that a past round keeps with each new one
MARGIN = 1.02  # a draft must promise this much over plain decoding: predictions are noisy
RETRY = 48  # rounds after which an arm that lost is tried once more


@dataclass
class Mean:
    """A mean that forgets."""

    value: float
    weight: float = 1.0

    def add(self, value: float) -> None:
        self.weight = self.weight * MEMORY + 1.0
        self.value += (value - self.value) / self.weight


@dataclass
class Arm:
    """What is known of one draft."""

    longest: int
    guess: float
    token_seconds: Mean | None = None
    survival: list[Mean] = field(default_factory=list)
    last_used: int = -(1 << 30)
    tries: int = 0

    def __post_init__(self) -> None:
        self.survival = [Mean(self.guess, PRIOR) for _ in range(self.longest)]

    def expected(self, length: int) -> float:
        """Drafts of ``length`` that survive, on average."""
        total, alive = 0.0, 1.0
        for mean in self.survival[:length]:
            alive *= mean.value
            total += alive
        return total


class Chooser:
    """Holds the arms of a session and what was measured of them, from one text to the next."""

    def __init__(self, arms: dict[str, Arm]) -> None:
        self.arms = arms
        self.step_seconds: dict[int, Mean] = {}
        self.round = 0

    def choose(self, available: dict[str, int]) -> tuple[str, int]:
        """The arm and its length; ``("none", 0)`` is plain decoding.

        available: the arms that can propose now, and the most tokens that each may.
        """
        self.round += 1
        if 1 not in self.step_seconds:
            return "none", 0
        for name, most in available.items():
            arm = self.arms[name]
            stale = self.round - arm.last_used > RETRY * max(1, arm.tries)
            if most > 0 and (arm.tries < 3 or stale):
                return name, min(most, arm.longest, 3)
        plain = 1.0 / self._seconds(1)
        best, best_rate = ("none", 0), plain * MARGIN
        for name, most in available.items():
            arm = self.arms[name]
            per_token = arm.token_seconds.value if arm.token_seconds else 0.0
            for length in range(1, min(most, arm.longest) + 1):
                seconds = length * per_token + self._seconds(length + 1)
                rate = (1.0 + arm.expected(length)) / seconds
                if rate > best_rate:
                    best, best_rate = (name, length), rate
        return best

    def saw_step(self, rows: int, seconds: float) -> None:
        """A verification of so many rows took so long."""
        mean = self.step_seconds.get(rows)
        if mean is None:
            self.step_seconds[rows] = Mean(seconds)
        else:
            # A step cannot be slower than a few times the usual; a hiccup of the machine can.
            mean.add(min(seconds, 4 * mean.value))

    def saw_draft(self, name: str, offered: int, accepted: int, seconds: float) -> None:
        """An arm's round: what it offered, what survived, what it took."""
        arm = self.arms[name]
        arm.last_used = self.round
        arm.tries += 1
        if not offered:
            return
        per_token = seconds / offered
        if arm.token_seconds is None:
            arm.token_seconds = Mean(per_token)
        else:
            arm.token_seconds.add(min(per_token, 4 * arm.token_seconds.value))
        for i in range(min(offered, accepted + 1, arm.longest)):
            arm.survival[i].add(1.0 if i < accepted else 0.0)

    def _seconds(self, rows: int) -> float:
        """Time of a step of so many rows: measured, or on the line through its neighbours."""
        known = self.step_seconds
        if rows in known:
            return known[rows].value
        below = [r for r in known if r < rows]
        above = [r for r in known if r > rows]
        if below and above:
            low, high = max(below), min(above)
            share = (rows - low) / (high - low)
            return known[low].value * (1 - share) + known[high].value * share
        if below:
            return known[max(below)].value * (1 + 0.05 * (rows - max(below)))
        return known[min(above)].value
