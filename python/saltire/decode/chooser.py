"""Which draft to use and how long: what is predicted to emit most tokens per unit of time.

All is measured while decoding. A model draft decides its own length as it goes: with s the chance
that all tokens so far stand, and a the chance that one more does, another token pays while

    s · a / rate  >  t_draft + t_row        i.e.  s >= worth = rate · (t_draft + t_row) / a

for it then gains more tokens than the same time would emit at the present rate. s is a product of
acceptances by confidence bin. An n-gram draft costs only rows, and its length n maximises
(1 + Σ_{i ≤ n} s_i) / t_step(n + 1), by how long a run of the text matched. Arms are compared by
tokens over seconds of their rounds; plain decoding is an arm too, so the fall-back below 1 is part
of the choice. An arm that was never used is hoped to be good, if theory allows it to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saltire.decode.drafts import confidence_bin
from saltire.ops.decoder_layer import CONFIDENCE_BINS

PRIOR = 3.0  # observations that a guess weighs
MEMORY = 0.99  # weight that a past round keeps with each new one
MARGIN = 1.02  # a draft must promise this much over plain decoding: predictions are noisy
PLAIN_EVERY = 96  # rounds after which plain decoding is timed again: machines drift
RETRY = 256  # rounds after which an arm that lost is hoped for again, doubling each time
HOPE = 0.85  # acceptance that an unknown draft is hoped to reach
LONGEST_RUN = 6  # of matched tokens that are told apart


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
    """What is known of one draft.

    cost: a guess of the time of one drafted token over that of a plain step. survival: by length of
    the matched run, for n-grams: chance that token i stands if those before it do.
    """

    longest: int
    cost: float = 0.0
    hope: float = HOPE
    emitted: float = 0.0  # tokens and seconds of its rounds, forgetting
    seconds: float = 0.0
    token_seconds: Mean | None = None
    acceptance: Mean = field(default_factory=lambda: Mean(0.8, PRIOR))
    bins: list[Mean] = field(default_factory=list)
    survival: list[list[Mean]] = field(default_factory=list)
    last_used: int = 0
    lapses: int = 0

    def __post_init__(self) -> None:
        middles = [(i + 0.5) / CONFIDENCE_BINS for i in range(CONFIDENCE_BINS)]
        self.bins = [Mean(middle, PRIOR) for middle in middles]
        self.survival = [
            [Mean(min(0.35 + 0.1 * run, 0.8), PRIOR) for _ in range(self.longest)]
            for run in range(LONGEST_RUN + 1)
        ]

    def hoped(self, plain_seconds: float) -> tuple[float, float]:
        """Tokens and seconds of a round, if the hope came true, at the best length."""
        best = (1.0, plain_seconds)
        emitted = alive = 1.0
        for length in range(1, self.longest + 1):
            alive *= self.hope
            emitted += alive
            seconds = plain_seconds * (length * self.cost + 1.0)
            if emitted / seconds > best[0] / best[1]:
                best = (emitted, seconds)
        return best

    def rate(self, plain_seconds: float) -> float:
        """Tokens a second: measured, with a round or two of hope mixed in."""
        emitted, seconds = self.hoped(plain_seconds)
        return (self.emitted + 2 * emitted) / (self.seconds + 2 * seconds)


@dataclass(frozen=True)
class Choice:
    """name: the draft, or ``none``. length: tokens at most. worth, survival: see the module; for
    drafts that decide as they go."""

    name: str
    length: int
    worth: float = 0.0
    survival: Tensor = field(default_factory=lambda: torch.ones(CONFIDENCE_BINS))


class Chooser:
    """Holds the arms of a session and what was measured of them, from one text to the next."""

    def __init__(self, arms: dict[str, Arm]) -> None:
        self.arms = arms
        self.step_seconds: dict[int, Mean] = {}
        self.round = 0
        self.last_plain = 0

    def choose(self, available: Mapping[str, tuple[int, int]]) -> Choice:
        """available: the arms that can propose now: the most tokens that each may, and how long a
        run of the text it matched (0: a model)."""
        self.round += 1
        if 1 not in self.step_seconds or self.round - self.last_plain > PLAIN_EVERY:
            self.last_plain = self.round
            return Choice("none", 0)
        plain_seconds = self.step_seconds[1].value
        best, best_rate = Choice("none", 0), MARGIN / plain_seconds
        for name, (most, run) in available.items():
            arm = self.arms[name]
            most = min(most, arm.longest)
            if most < 1:
                continue
            if run > 0:
                length, rate = self._best_length(arm, most, run)
                choice = Choice(name, length)
            else:
                self._forgive(arm)
                rate = arm.rate(plain_seconds)
                choice = Choice(name, most)
            if rate > best_rate:
                best, best_rate = choice, rate
        if best.length and not available[best.name][1]:
            arm = self.arms[best.name]
            return Choice(
                best.name,
                best.length,
                self._worth(arm, best_rate),
                torch.tensor([mean.value for mean in arm.bins]),
            )
        return best

    def saw_step(self, rows: int, seconds: float) -> None:
        """A verification of so many rows took so long."""
        mean = self.step_seconds.get(rows)
        if mean is None:
            self.step_seconds[rows] = Mean(seconds)
        else:
            # A step cannot be slower than a few times the usual; a hiccup of the machine can.
            mean.add(min(seconds, 2 * mean.value))
        if rows == 1:
            self.last_plain = self.round

    def saw_draft(
        self,
        name: str,
        run: int,
        offered: int,
        accepted: int,
        shares: Sequence[float],
        draft_seconds: float,
        step_seconds: float,
    ) -> None:
        """One sequence's round: what an arm offered, with what confidence, what survived, and what
        it all took."""
        arm = self.arms[name]
        arm.last_used = self.round
        if not offered:
            return
        arm.emitted = arm.emitted * MEMORY + 1 + accepted
        arm.seconds = arm.seconds * MEMORY + draft_seconds + step_seconds
        per_token = draft_seconds / offered
        if arm.token_seconds is None:
            arm.token_seconds = Mean(per_token)
        arm.token_seconds.add(min(per_token, 2 * arm.token_seconds.value))
        for i in range(min(offered, accepted + 1, arm.longest)):
            stood = 1.0 if i < accepted else 0.0
            arm.acceptance.add(stood)
            if run > 0:
                arm.survival[min(run, LONGEST_RUN)][i].add(stood)
            if i < len(shares):
                arm.bins[confidence_bin(shares[i])].add(stood)

    def _worth(self, arm: Arm, rate: float) -> float:
        plain = self.step_seconds[1].value
        token = arm.token_seconds.value if arm.token_seconds else arm.cost * plain
        rows = max(self.step_seconds)
        row = max(0.0, (self._seconds(rows) - plain) / (rows - 1)) if rows > 1 else 0.05 * plain
        return rate * (token + row) / max(arm.acceptance.value, 0.1)

    def _best_length(self, arm: Arm, most: int, run: int) -> tuple[int, float]:
        """The length of an n-gram draft that emits fastest, and how fast."""
        best, best_rate, alive, emitted = 0, 0.0, 1.0, 1.0
        for length in range(1, most + 1):
            alive *= arm.survival[min(run, LONGEST_RUN)][length - 1].value
            emitted += alive
            rate = emitted / self._seconds(length + 1)
            if rate > best_rate:
                best, best_rate = length, rate
        return best, best_rate

    def _forgive(self, arm: Arm) -> None:
        """Let an arm that has long lost start anew: texts change."""
        if arm.seconds and self.round - arm.last_used > RETRY << min(arm.lapses, 8):
            arm.emitted = arm.seconds = 0.0
            arm.last_used = self.round
            arm.lapses += 1

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
