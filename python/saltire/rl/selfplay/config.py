"""The settings of self-play, as ``saltire train`` reads them where they say ``kind: selfplay``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from saltire.errors import SaltireError
from saltire.rl.config import (
    CheckpointConfig,
    EntropyConfig,
    LoraConfig,
    OptimiserConfig,
    make_actuator,
    make_controller,
    make_schedule,
)
from saltire.rl.dept import DeptConfig
from saltire.rl.selfplay.agents import Engine, Voice


@dataclass(frozen=True)
class MatchesConfig:
    """Each step plays ``matches`` matches, over all ranks, ``in_flight`` of them at a time."""

    matches: int = 64
    in_flight: int = 64
    max_new_tokens: int = 128
    temperature: float = 1.0
    think: bool = True
    engine: Engine = "auto"

    def __post_init__(self) -> None:
        if self.matches < 1 or self.in_flight < 1:
            raise SaltireError(
                f"matches: matches is {self.matches}, in_flight {self.in_flight}; both must be at "
                "least 1."
            )
        if not self.temperature > 0:
            raise SaltireError(
                f"matches.temperature is {self.temperature}; training samples, so it must be above "
                "0."
            )
        self.voice(0)

    def voice(self, seed: int) -> Voice:
        """How the learner is asked and sampled."""
        return Voice(self.max_new_tokens, self.temperature, self.think, seed)


@dataclass(frozen=True)
class AdvantagesConfig:
    """What turns outcomes into advantages: ``dept``, ``rae`` (one average a role), ``grpo``
    (groups of the batch) or ``none``. fast, slow, scale and margin are DEPT's, decay is RAE's."""

    kind: Literal["dept", "rae", "grpo", "none"] = "dept"
    fast: float = 0.5
    slow: float = 0.95
    scale: float = 1.0
    margin: float | None = None
    decay: float = 0.95

    def __post_init__(self) -> None:
        self.dept()
        if not 0 <= self.decay < 1:
            raise SaltireError(f"advantages.decay is {self.decay}; it must be in [0, 1).")

    def dept(self) -> DeptConfig:
        """DEPT's part."""
        return DeptConfig(self.fast, self.slow, self.scale, self.margin)


@dataclass(frozen=True)
class OpponentConfig:
    """Who sits opposite: the learner itself, one of its past selves, or a fixed agent.

    share: of the matches played against the other; the rest are against itself. A past self joins
    every ``every`` steps, the start included, and the last ``keep`` are kept; each step draws one.
    agent: a script's name or a model, for ``fixed``.
    """

    kind: Literal["self", "past", "fixed"] = "self"
    agent: str = ""
    share: float = 0.5
    every: int = 10
    keep: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SaltireError(f"opponent.share is {self.share}; it must be in (0, 1].")
        if self.every < 1 or self.keep < 1:
            raise SaltireError("opponent: every and keep must be at least 1.")
        if (self.kind == "fixed") != bool(self.agent):
            raise SaltireError(
                f"opponent: kind is {self.kind!r}, agent {self.agent!r}; a fixed opponent, and it "
                "alone, names its agent."
            )


@dataclass(frozen=True)
class MeasureConfig:
    """Every ``every`` steps (0: never), ``matches`` matches against ``agent`` give a win rate."""

    every: int = 0
    matches: int = 32
    agent: str = "random"


@dataclass(frozen=True)
class SelfPlayConfig:
    """A run. options: the game's. players: seats, where a game leaves a choice; 0: fewest."""

    game: str
    output: str
    options: Mapping[str, Any] = field(default_factory=dict)
    players: int = 0
    model: str = "default"
    seed: int = 0
    steps: int = 400
    matches: MatchesConfig = field(default_factory=MatchesConfig)
    advantages: AdvantagesConfig = field(default_factory=AdvantagesConfig)
    opponent: OpponentConfig = field(default_factory=OpponentConfig)
    update: OptimiserConfig = field(default_factory=OptimiserConfig)
    lora: LoraConfig | None = None
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    evaluation: MeasureConfig = field(default_factory=MeasureConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.seed < 0:
            raise SaltireError(
                f"steps is {self.steps}, seed {self.seed}; steps must be at least 1, seed at least "
                "0."
            )
        if not self.output:
            raise SaltireError("output must name a directory.")
        if self.matches.matches % self.update.minibatches:
            raise SaltireError(
                f"matches.matches is {self.matches.matches}, update.minibatches "
                f"{self.update.minibatches}; the first must be a multiple of the second."
            )
        if self.update.kl_coefficient:
            raise SaltireError("update.kl_coefficient has no place in self-play; leave it at 0.")
        make_schedule(self.entropy.schedule, self.steps)
        make_controller(self.entropy.controller)
        make_actuator(self.entropy.actuator)

    def that_matter(self) -> dict[str, Any]:
        """The settings on which the result of a step depends, as plain values."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        for name in ("output", "checkpoint", "tensorboard"):
            del values[name]
        return values

    def check_same(self, other: Mapping[str, Any], where: str) -> None:
        """Raise SaltireError if a run with settings ``other`` would not be continued by this."""
        own = self.that_matter()
        changed = [name for name in own if other.get(name) != own[name]]
        if changed:
            raise SaltireError(
                f"the run of {where} had other settings in: {', '.join(changed)}. Resume with the "
                "settings it was started with, or choose another output."
            )


def learning_rate(config: OptimiserConfig, step: int) -> float:
    """With the warm-up's share of it."""
    return config.learning_rate * (min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0)


def is_due(step: int, every: int, steps: int) -> bool:
    """After this step? ``every`` = 0 means only after the last."""
    return step + 1 == steps or bool(every and (step + 1) % every == 0)
