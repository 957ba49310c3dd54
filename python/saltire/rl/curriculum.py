"""Curriculum: prompts pooled by how often their rollouts pass, weighed per entropy phase.

The paper ties curriculum learning to the two phases of entropy but does not say which difficulty
belongs to which; so both orders are here, and the default is neutral: prompts in shuffled order,
each as often as any other.

What is drawn is a pure function of (seed, step, pass rates): no generator needs to be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from saltire.errors import SaltireError
from saltire.rl.schedules import Phase

Order = Literal["neutral", "easy_first", "hard_first"]
Band = Literal["unseen", "easy", "medium", "hard"]

# Weights of a prompt by band in the (first, second) half of each order. An unseen prompt counts as
# medium: its rate is unknown, not low. The 3:1 ratio is ours; no pool is ever shut out, because a
# prompt that is never drawn can never show that it has become easy.
_WEIGHTS: dict[Order, dict[Phase, dict[Band, float]]] = {
    "neutral": {
        "stable": {"unseen": 1, "easy": 1, "medium": 1, "hard": 1},
        "anneal": {"unseen": 1, "easy": 1, "medium": 1, "hard": 1},
    },
    "easy_first": {
        "stable": {"unseen": 2, "easy": 3, "medium": 2, "hard": 1},
        "anneal": {"unseen": 2, "easy": 1, "medium": 2, "hard": 3},
    },
    "hard_first": {
        "stable": {"unseen": 2, "easy": 1, "medium": 2, "hard": 3},
        "anneal": {"unseen": 2, "easy": 3, "medium": 2, "hard": 1},
    },
}


@dataclass(frozen=True)
class CurriculumConfig:
    """Order of difficulty over the phases, and the pass rates that divide the bands."""

    order: Order = "neutral"
    hard_below: float = 0.25
    easy_above: float = 0.75
    memory: float = 0.7

    def __post_init__(self) -> None:
        if self.order not in _WEIGHTS:
            raise SaltireError(
                f"curriculum: order is {self.order!r}; choose one of {', '.join(_WEIGHTS)}."
            )
        if not 0 <= self.hard_below <= self.easy_above <= 1:
            raise SaltireError(
                f"curriculum: hard_below is {self.hard_below} and easy_above {self.easy_above}; "
                "they must be in [0, 1], the first not above the second."
            )
        if not 0 <= self.memory < 1:
            raise SaltireError(f"curriculum: memory is {self.memory}; it must be in [0, 1).")

    def band(self, rate: float | None) -> Band:
        """The band of a pass rate; None is a prompt that has not been tried."""
        if rate is None:
            return "unseen"
        if rate < self.hard_below:
            return "hard"
        return "easy" if rate > self.easy_above else "medium"

    def weight(self, rate: float | None, phase: Phase) -> float:
        """How often a prompt of this pass rate is drawn in this phase, relative to others."""
        return _WEIGHTS[self.order][phase][self.band(rate)]


@dataclass
class Curriculum:
    """Draws prompts 0 … size − 1 and remembers a running pass rate for each."""

    size: int
    seed: int
    config: CurriculumConfig = field(default_factory=CurriculumConfig)
    rates: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SaltireError("curriculum: there are no prompts to draw from.")

    def draw(self, step: int, count: int, phase: Phase) -> list[int]:
        """The ``count`` prompts of this step.

        Neutral: the next ``count`` of an endless row of shuffles, so every prompt comes once per
        epoch. Otherwise: without replacement within the step, by weight (with, if count > size).
        """
        if self.config.order == "neutral":
            return [self._shuffled(step * count + i) for i in range(count)]
        weights = np.array(
            [self.config.weight(self.rates.get(i), phase) for i in range(self.size)], float
        )
        rng = np.random.default_rng((self.seed, 1, step))
        chosen = rng.choice(
            self.size, size=count, replace=count > self.size, p=weights / weights.sum()
        )
        return [int(i) for i in chosen]

    def observe(self, prompts: Sequence[int], pass_rates: Sequence[float]) -> None:
        """Take the pass rates of a step's groups: r ← memory·r + (1 − memory)·rate."""
        for prompt, rate in zip(prompts, pass_rates, strict=True):
            old = self.rates.get(prompt)
            keep = self.config.memory
            self.rates[prompt] = rate if old is None else keep * old + (1 - keep) * rate

    def pools(self) -> dict[Band, int]:
        """How many prompts are in each band."""
        counts: dict[Band, int] = {"unseen": 0, "easy": 0, "medium": 0, "hard": 0}
        for i in range(self.size):
            counts[self.config.band(self.rates.get(i))] += 1
        return counts

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers; JSON turns the keys into text, which loading turns back."""
        return {"rates": {str(i): rate for i, rate in self.rates.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.rates = {int(i): float(rate) for i, rate in state["rates"].items()}

    def _shuffled(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.size)
        return int(self._order[place])
