"""Which draft to use and how long: what is predicted to emit most tokens per unit of time.

All is measured while decoding, in plain steps: times are divided by what a plain step takes at the
moment, so that a machine whose speed drifts misleads nobody. A model draft decides its own length
as it goes: with s the chance that all tokens so far stand, and a the chance that one more does,
another token pays while

    s · a / rate  >  t_draft + t_row        i.e.  s >= worth = rate · (t_draft + t_row) / a

for it then gains more tokens than the same time would emit at the present rate. s is a product of
acceptances by confidence bin. An n-gram draft costs only rows, and its length n maximises
(1 + Σ_{i ≤ n} s_i) / t_step(n + 1), by how long a run of the text matched. Arms are compared by
tokens over time of their rounds; plain decoding is an arm too, so the fall-back below 1 is part of
the choice. An arm that was never used is hoped to be good, as far as theory allows it to be.
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
CLOCK = 0.15  # weight of the newest round in what a plain step takes at the moment
ROW_GUESS = 0.06  # of a plain step, that one more row takes
MARGIN = 1.03  # an arm must promise this much over a simpler one: predictions are noisy
PLAIN_EVERY = 48  # rounds after which a plain step is timed again
RETRY = 256  # rounds after which an arm that lost is hoped for again, doubling each time
HOPE = 0.85  # acceptance that an unknown draft is hoped to reach
HOPED_ROUNDS = 2.0  # that the hope weighs
LONGEST_RUN = 6  # of matched tokens that are told apart
ROWS = 4  # of the step whose extra rows tell what one row takes


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
    """What is known of one draft; times in plain steps.

    token_time: of one drafted token, a guess at first. bins: acceptance by confidence. survival: by
    length of the matched run, for n-grams: chance that token i stands if those before it do.
    """

    longest: int
    cost: float = 0.0
    hope: float = HOPE
    emitted: float = 0.0  # tokens and time of its rounds, forgetting
    time: float = 0.0
    last_used: int = 0
    lapses: int = 0
    token_time: Mean = field(init=False)
    acceptance: Mean = field(init=False)
    bins: list[Mean] = field(init=False)
    survival: list[list[Mean]] = field(init=False)

    def __post_init__(self) -> None:
        self.token_time = Mean(self.cost, PRIOR)
        self.acceptance = Mean(0.8, PRIOR)
        # A model's own confidence is a fair guess of its acceptance, and too low where it is low.
        shares = [(i + 0.5) / CONFIDENCE_BINS for i in range(CONFIDENCE_BINS)]
        self.bins = [Mean(0.4 + 0.6 * share, PRIOR) for share in shares]
        self.survival = [
            [Mean(min(0.35 + 0.1 * run, 0.8), PRIOR) for _ in range(self.longest)]
            for run in range(LONGEST_RUN + 1)
        ]

    def hoped(self) -> tuple[float, float]:
        """Tokens and time of a round, if the hope came true, at the best length."""
        best = (1.0, 1.0)
        emitted = alive = 1.0
        for length in range(1, self.longest + 1):
            alive *= self.hope
            emitted += alive
            time = 1.0 + length * (self.token_time.value + ROW_GUESS)
            if emitted / time > best[0] / best[1]:
                best = (emitted, time)
        return best

    def rate(self) -> float:
        """Tokens for the time of a plain step: measured, with some rounds of hope mixed in."""
        emitted, time = self.hoped()
        return (self.emitted + HOPED_ROUNDS * emitted) / (self.time + HOPED_ROUNDS * time)


@dataclass(frozen=True)
class Choice:
    """name: the draft, or ``none``. length: tokens at most. worth, survival: see the module; for
    drafts that decide as they go."""

    name: str
    length: int
    worth: float = 0.0
    survival: Tensor = field(default_factory=lambda: torch.ones(CONFIDENCE_BINS))


class Chooser:
    """Holds the arms of a session and what was measured of them, from one text to the next.

    arms: simpler ones first; a later one must promise clearly more.
    """

    def __init__(self, arms: dict[str, Arm]) -> None:
        self.arms = arms
        self.clock = 0.0  # seconds of a plain step at the moment
        self.step_time: dict[int, Mean] = {}  # in plain steps, by rows
        self.round = 0
        self.last_plain = 0

    def choose(self, available: Mapping[str, tuple[int, int]]) -> Choice:
        """available: the arms that can propose now: the most tokens that each may, and how long a
        run of the text it matched (0: a model)."""
        self.round += 1
        if not self.clock or self.round - self.last_plain > PLAIN_EVERY:
            return Choice("none", 0)
        best, best_rate = Choice("none", 0), 1.0
        for name, arm in self.arms.items():
            most, run = available.get(name, (0, 0))
            most = min(most, arm.longest)
            if most < 1:
                continue
            if run > 0:
                length, rate = self._best_length(arm, most, run)
            else:
                self._forgive(arm)
                length, rate = most, arm.rate()
            if rate > best_rate * MARGIN:
                best, best_rate = Choice(name, length), rate
        if best.length == 0 or available[best.name][1] > 0:
            return best
        arm = self.arms[best.name]
        survival = torch.tensor([mean.value for mean in arm.bins])
        return Choice(best.name, best.length, self._worth(arm, best_rate), survival)

    def saw_step(self, rows: int, seconds: float) -> None:
        """A verification of so many rows took so long."""
        if rows == 1:
            self.last_plain = self.round
        if not self.clock:
            self.clock = seconds / self.time_of(rows)
            return
        # A hiccup of the machine takes many times the usual; the clock shall not follow it.
        seconds = min(seconds, 2 * self.clock * self.time_of(rows))
        if rows > 1:
            known = self.step_time.setdefault(rows, Mean(self.time_of(rows), PRIOR))
            known.add(seconds / self.clock)
        self.clock += CLOCK * (seconds / self.time_of(rows) - self.clock)

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
        per_token = min(draft_seconds / offered / self.clock, 2 * max(arm.token_time.value, 0.01))
        arm.token_time.add(per_token)
        arm.emitted = arm.emitted * MEMORY + 1 + accepted
        arm.time = arm.time * MEMORY + offered * per_token
        arm.time += min(step_seconds / self.clock, 2 * self.time_of(offered + 1))
        for i in range(min(offered, accepted + 1, arm.longest)):
            stood = 1.0 if i < accepted else 0.0
            arm.acceptance.add(stood)
            if run > 0:
                arm.survival[min(run, LONGEST_RUN)][i].add(stood)
            if i < len(shares):
                arm.bins[confidence_bin(shares[i])].add(stood)

    def time_of(self, rows: int) -> float:
        """Time of a step of so many rows: measured, or on the line through its neighbours."""
        known = self.step_time
        if rows == 1:
            return 1.0
        if rows in known:
            return known[rows].value
        low = max((r for r in known if r < rows), default=1)
        above = [r for r in known if r > rows]
        start = known[low].value if low > 1 else 1.0
        if not above:
            return start + ROW_GUESS * (rows - low)
        high = min(above)
        return start + (known[high].value - start) * (rows - low) / (high - low)

    def _worth(self, arm: Arm, rate: float) -> float:
        row = max(0.0, self.time_of(ROWS) - 1.0) / (ROWS - 1)
        return rate * (arm.token_time.value + row) / max(arm.acceptance.value, 0.1)

    def _best_length(self, arm: Arm, most: int, run: int) -> tuple[int, float]:
        """The length of an n-gram draft that emits fastest, and how fast."""
        best, best_rate, alive, emitted = 0, 0.0, 1.0, 1.0
        for length in range(1, most + 1):
            alive *= arm.survival[min(run, LONGEST_RUN)][length - 1].value
            emitted += alive
            rate = emitted / self.time_of(length + 1)
            if rate > best_rate:
                best, best_rate = length, rate
        return best, best_rate

    def _forgive(self, arm: Arm) -> None:
        """Let an arm that has long lost start anew: texts change."""
        if arm.time and self.round - arm.last_used > RETRY << min(arm.lapses, 8):
            arm.emitted = arm.time = 0.0
            arm.last_used = self.round
            arm.lapses += 1
