"""Two toys in which plain self-play gets stuck, and what each kind of advantage does in them.

A player says a few words, each drawn from its own softmax; learning is the policy gradient under
Adam, as for a language model. In both toys trying is a little worse on average than not trying
until one phrase has been found, so a role average closes the door before that: then every match
ends the same way and its gradient is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from saltire.rl.dept import Dept, DeptConfig
from saltire.rl.match_outcome import AdvantageEstimator, MatchOutcome
from saltire.rl.role_baselines import NoBaseline, RoleAverage, RoleGroup

OUTCOMES = ("player 0", "player 1", "draw")
ROLES = ("player 0", "player 1")
WINDOW = 50  # steps over which shares and gradient norms are averaged


class Toy(Protocol):
    """Rules of a toy of two; ``stuck``: the outcome in which plain self-play ends."""

    name: ClassVar[str]
    stuck: ClassVar[str]

    def logits(self) -> tuple[Tensor, Tensor]:
        """Each player's logits at the start: f64 [words, V]."""
        ...

    def play(
        self, words: Sequence[Tensor], draw: Callable[[], Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Player 0's reward f64 [B], and which words each player said, f64 [B, words].

        words: i64 [B, words] per player; draw: f64 [B] uniform in [0, 1).
        """
        ...


@dataclass(frozen=True)
class Standoff:
    """Forced draw: both may wait, which draws. A strike wins ``clumsy`` of the time, so a little
    less than half, unless its phrase is the right one; then it wins ``skilled`` of the time."""

    name: ClassVar[str] = "forced draw"
    stuck: ClassVar[str] = "draw"

    words: int = 3
    vocabulary: int = 8
    wait: float = 0.7
    clumsy: float = 0.46
    skilled: float = 0.95

    def logits(self) -> tuple[Tensor, Tensor]:
        start = _choice_then_phrase(self.words, self.vocabulary, self.wait)
        return start, start.clone()

    def play(
        self, words: Sequence[Tensor], draw: Callable[[], Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        strikes = [said[:, 0] == 1 for said in words]
        right = [
            _right(said, self.vocabulary) & hit for said, hit in zip(words, strikes, strict=True)
        ]
        chance = [torch.where(r, self.skilled, self.clumsy).double() for r in right]
        duel = torch.where(
            right[0] == right[1], 0.5, torch.where(right[0], self.skilled, 1 - self.skilled)
        )
        first = torch.where(
            strikes[0] & strikes[1], duel, torch.where(strikes[0], chance[0], 1 - chance[1])
        )
        reward = torch.where(draw() < first, 1.0, -1.0).double()
        reward[~strikes[0] & ~strikes[1]] = 0.0
        said0, said1 = (_spoken(hit, self.words) for hit in strikes)
        return reward, (said0, said1)


@dataclass(frozen=True)
class Uphill:
    """Dominant outcome: player 0 wins nearly always. Player 1's habit wins ``luck`` of the time;
    a bid only draws, ``drawn`` of the time, and is worth a little less, unless its phrase is the
    right one; then it wins ``skilled`` of the time. Player 0 has nothing to decide."""

    name: ClassVar[str] = "dominant outcome"
    stuck: ClassVar[str] = "player 0"

    words: int = 3
    vocabulary: int = 8
    habit: float = 0.5
    luck: float = 0.08
    drawn: float = 0.14
    skilled: float = 0.9

    def logits(self) -> tuple[Tensor, Tensor]:
        idle = torch.zeros(1, 2, dtype=torch.float64)
        return idle, _choice_then_phrase(self.words, self.vocabulary, self.habit)

    def play(
        self, words: Sequence[Tensor], draw: Callable[[], Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        bids, chance = words[1][:, 0] == 1, draw()
        right = _right(words[1], self.vocabulary) & bids
        habit = torch.where(chance < self.luck, 1.0, -1.0)
        bid = torch.where(chance < self.drawn, 0.0, -1.0)
        phrase = torch.where(chance < self.skilled, 1.0, -1.0)
        second = torch.where(right, phrase, torch.where(bids, bid, habit)).double()
        idle = torch.ones(len(bids), 1, dtype=torch.float64)
        return -second, (idle, _spoken(bids, self.words))


TOYS: tuple[Toy, ...] = (Standoff(), Uphill())


@dataclass(frozen=True)
class ToyRun:
    """Per step: the gradient's norm and the share of each of OUTCOMES; report: the last batch's."""

    toy: Toy
    norms: list[float]
    shares: list[tuple[float, ...]]
    reports: list[dict[str, float]]

    def stuck_share(self) -> list[float]:
        """Share of the outcome in which the toy gets stuck, averaged over windows."""
        column = OUTCOMES.index(self.toy.stuck)
        return _windows([shares[column] for shares in self.shares])

    def left(self) -> bool:
        """Whether that outcome has under two thirds of the last tenth of the run."""
        column = OUTCOMES.index(self.toy.stuck)
        last = self.shares[-max(1, len(self.shares) // 10) :]
        return sum(shares[column] for shares in last) / len(last) < 2 / 3

    def lowest_norm(self) -> float:
        """Smallest gradient norm over its start, by windows, while the impasse lasts: until its
        outcome falls under a third, or to the end."""
        norms, shares = _windows(self.norms), self.stuck_share()
        out = next((i for i, share in enumerate(shares) if share < 1 / 3), len(shares))
        return min(norms[: max(out, 1)]) / norms[0]


def estimator(kind: str, margin: float | None = None) -> AdvantageEstimator:
    """A fresh estimator for the toys: "dept", "rae", "grpo" or "none"."""
    outcomes, roles = {"toy": OUTCOMES}, {"toy": ROLES}
    makers: dict[str, Callable[[], AdvantageEstimator]] = {
        "dept": lambda: Dept(outcomes, roles, DeptConfig(margin=margin)),
        "rae": lambda: RoleAverage(dict(roles)),
        "grpo": RoleGroup,
        "none": NoBaseline,
    }
    return makers[kind]()


def run_toy(
    toy: Toy,
    advantages: AdvantageEstimator,
    seed: int,
    steps: int = 2000,
    batch: int = 64,
    learning_rate: float = 0.1,
) -> ToyRun:
    """Self-play of ``steps`` batches from the toy's start; every random number comes from seed."""
    generator = torch.Generator().manual_seed(seed)
    logits = [start.requires_grad_() for start in toy.logits()]
    optimiser = torch.optim.Adam(logits, lr=learning_rate)
    run = ToyRun(toy, [], [], [])

    def draw() -> Tensor:
        return torch.rand(batch, dtype=torch.float64, generator=generator)

    for _ in range(steps):
        log_p = [role.log_softmax(-1) for role in logits]
        words = [
            torch.multinomial(role.exp(), batch, replacement=True, generator=generator).T
            for role in log_p
        ]
        reward, spoken = toy.play(words, draw)
        values = torch.tensor(advantages.advantages(_outcomes(reward)), dtype=torch.float64)
        loss = torch.zeros((), dtype=torch.float64)
        for player, (role, said, mask) in enumerate(zip(log_p, words, spoken, strict=True)):
            chosen = role[torch.arange(role.shape[0]), said]
            loss = loss - (values[:, player] * (chosen * mask).sum(1)).mean()
        optimiser.zero_grad()
        loss.backward()
        norms = [float(role.grad.norm()) for role in logits if role.grad is not None]
        run.norms.append(math.hypot(*norms))
        run.shares.append(tuple(float((reward == r).double().mean()) for r in (1, -1, 0)))
        run.reports.append(advantages.report())
        optimiser.step()
    return run


def _outcomes(reward: Tensor) -> list[MatchOutcome]:
    label = {1.0: OUTCOMES[0], -1.0: OUTCOMES[1], 0.0: OUTCOMES[2]}
    return [MatchOutcome("toy", label[r], ROLES, (r, -r)) for r in reward.tolist()]


def _choice_then_phrase(words: int, vocabulary: int, first: float) -> Tensor:
    """Logits of a first word out of two, ``first`` for word 0, and of ``words`` uniform ones."""
    logits = torch.zeros(1 + words, vocabulary, dtype=torch.float64)
    logits[0, 2:] = -1e9
    logits[0, 0] = math.log(first / (1 - first))
    return logits


def _right(said: Tensor, vocabulary: int) -> Tensor:
    """Whether everything after the first word is the last word of the vocabulary."""
    return (said[:, 1:] == vocabulary - 1).all(1)


def _spoken(goes_on: Tensor, words: int) -> Tensor:
    """1 for the first word, and for the phrase where it is said: only said words teach."""
    rest = goes_on.double()[:, None].expand(-1, words)
    return torch.cat([torch.ones(len(goes_on), 1, dtype=torch.float64), rest], 1)


def _windows(values: Sequence[float]) -> list[float]:
    parts = [values[i : i + WINDOW] for i in range(0, len(values), WINDOW)]
    return [sum(part) / len(part) for part in parts]
