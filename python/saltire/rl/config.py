"""The trainer's settings, as ``saltire train`` reads them; each part is checked when it is made."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from saltire.errors import SaltireError
from saltire.rl.actuators import Actuator, actuator
from saltire.rl.control import Unit
from saltire.rl.controllers import PID, Controller, OpenLoop, SignRule
from saltire.rl.curriculum import CurriculumConfig
from saltire.rl.losses import Algorithm
from saltire.rl.schedules import (
    Constant,
    Cyclic,
    Piecewise,
    PlateauAnneal,
    Ramp,
    Schedule,
    StableThenAnneal,
    schedule_for_goal,
)
from saltire.settings import build, unknown_key


def _positive(part: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise SaltireError(f"{part}.{name} is {value}; it must be above 0.")


@dataclass(frozen=True)
class TaskConfig:
    """What is trained on. ``held_out`` rows, the last, are for evaluation only."""

    kind: Literal["file", "countdown", "arithmetic"]
    path: str = ""
    reward: str = "number"
    rows: int = 10_000
    held_out: int = 128
    numbers: int = 3
    largest: int = 9
    digits: int = 2
    terse: bool = False
    instruction: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        _positive("task", rows=self.rows, held_out=self.held_out)
        if self.kind == "file" and not self.path:
            raise SaltireError("task.path must be given for a task of kind file.")


@dataclass(frozen=True)
class RolloutConfig:
    """Each step samples ``samples`` completions of each of ``prompts`` prompts, over all ranks.

    ``engine``: our decoder, transformers, or the decoder wherever it can run the model. ``batch``
    is how many are generated at a time. ``resample`` is how many times prompts whose
    rewards are all equal are replaced by others before the update: DAPO's dynamic sampling.
    """

    prompts: int = 8
    samples: int = 8
    max_new_tokens: int = 256
    temperature: float = 1.0
    engine: Literal["auto", "decoder", "transformers"] = "auto"
    batch: int = 64
    resample: int = 0
    overlong_buffer: int = 0

    def __post_init__(self) -> None:
        _positive(
            "rollout", prompts=self.prompts, max_new_tokens=self.max_new_tokens, batch=self.batch,
            temperature=self.temperature,
        )  # fmt: skip
        if self.samples < 2:
            raise SaltireError(
                f"rollout.samples is {self.samples}; a group needs at least 2, since each sample "
                "is judged against the others."
            )
        if self.resample < 0 or not 0 <= self.overlong_buffer <= self.max_new_tokens:
            raise SaltireError(
                "rollout: resample must be at least 0, overlong_buffer between 0 and "
                "max_new_tokens."
            )


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW, and how often a rollout is used: minibatches · epochs updates.

    ``top_entropy``: the share of the sampled tokens that is learnt from, highest entropy first.
    """

    algorithm: Algorithm = "dapo"
    learning_rate: float = 1e-6
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    max_grad_norm: float = 1.0
    minibatches: int = 2
    epochs: int = 1
    micro_batch: int = 8
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coefficient: float = 0.0
    top_entropy: float = 1.0
    bf16: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.top_entropy <= 1:
            raise SaltireError(
                f"update.top_entropy is {self.top_entropy}; it must be above 0 and at most 1."
            )
        _positive(
            "update", learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm,
            minibatches=self.minibatches, epochs=self.epochs, micro_batch=self.micro_batch,
        )  # fmt: skip
        if self.kl_coefficient < 0 or self.warmup < 0 or self.weight_decay < 0:
            raise SaltireError("update: kl_coefficient, warmup and weight_decay are at least 0.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise SaltireError(f"update.betas are {self.betas}; each must be in [0, 1).")

    @property
    def updates_per_rollout(self) -> int:
        """With 1, updates are strictly on-policy and the clip has no authority."""
        return self.minibatches * self.epochs


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in place of full training: W + (alpha/rank)·B·A on every linear chosen."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip

    def __post_init__(self) -> None:
        _positive("lora", rank=self.rank, alpha=self.alpha)
        if not self.targets:
            raise SaltireError("lora.targets is empty; name at least one linear layer.")


@dataclass(frozen=True)
class EntropyConfig:
    """The control of entropy; without a schedule entropy is measured and left alone.

    ``schedule``, ``controller`` and ``actuator`` are mappings with a ``kind`` (or ``name``).
    ``probe`` measures the actuator's authority before the first step and sets the direction.
    """

    schedule: Mapping[str, Any] | None = None
    controller: Mapping[str, Any] = field(default_factory=lambda: {"kind": "pid"})
    actuator: Mapping[str, Any] = field(default_factory=lambda: {"name": "clip_high"})
    unit: Unit = "initial"
    probe: bool = True


@dataclass(frozen=True)
class EvaluationConfig:
    """Every ``every`` steps (0: never), ``samples`` completions of ``prompts`` held-out prompts."""

    every: int = 20
    prompts: int = 64
    samples: int = 16
    ks: tuple[int, ...] = (1, 4, 16)
    plateau_k: int = 1

    def __post_init__(self) -> None:
        _positive("evaluation", prompts=self.prompts, samples=self.samples)
        if self.every < 0:
            raise SaltireError(f"evaluation.every is {self.every}; it must be at least 0.")
        for k in self.ks:
            if not 1 <= k <= self.samples:
                raise SaltireError(
                    f"evaluation.ks holds {k}; each must be between 1 and samples, {self.samples}."
                )
        if self.plateau_k not in self.ks:
            raise SaltireError(f"evaluation.plateau_k is {self.plateau_k}; it must be one of ks.")


@dataclass(frozen=True)
class CheckpointConfig:
    """Every ``every`` steps (0: only at the end), keeping the last ``keep``."""

    every: int = 20
    keep: int = 2

    def __post_init__(self) -> None:
        _positive("checkpoint", keep=self.keep)
        if self.every < 0:
            raise SaltireError(f"checkpoint.every is {self.every}; it must be at least 0.")


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    task: TaskConfig
    output: str
    model: str = "default"
    seed: int = 0
    steps: int = 100
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    update: OptimiserConfig = field(default_factory=OptimiserConfig)
    lora: LoraConfig | None = None
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tensorboard: bool = False

    def __post_init__(self) -> None:
        _positive("settings", steps=self.steps)
        if self.seed < 0:
            raise SaltireError(f"seed is {self.seed}; it must be at least 0.")
        if not self.output:
            raise SaltireError("output must name a directory.")
        if self.rollout.prompts % self.update.minibatches:
            raise SaltireError(
                f"rollout.prompts is {self.rollout.prompts}, update.minibatches "
                f"{self.update.minibatches}; the first must be a multiple of the second."
            )
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


_SCHEDULES: dict[str, tuple[type, dict[str, Any]]] = {
    "constant": (Constant, {}),
    "linear": (Ramp, {"shape": "linear"}),
    "cosine": (Ramp, {"shape": "cosine"}),
    "exponential": (Ramp, {"shape": "exponential"}),
    "cyclic": (Cyclic, {}),
    "stable_then_anneal": (StableThenAnneal, {}),
    "piecewise": (Piecewise, {}),
    "plateau": (PlateauAnneal, {}),
}


@dataclass(frozen=True)
class _Goal:
    k: int
    stable: float = 1.0
    floor: float = 0.1


def make_schedule(values: Mapping[str, Any] | None, steps: int) -> Schedule | None:
    """The schedule that ``values`` describes; where it has ``steps``, the run's is the default."""
    if values is None:
        return None
    kind, rest = _kind(values, "kind", "entropy.schedule", [*_SCHEDULES, "goal"])
    if kind == "goal":
        goal = build(_Goal, rest, "entropy.schedule")
        return schedule_for_goal(goal.k, steps, goal.stable, goal.floor)
    schedule, fixed = _SCHEDULES[kind]
    if schedule in (Ramp, StableThenAnneal):
        fixed = {**fixed, "steps": rest.pop("steps", steps)}
    made: Schedule = build(schedule, {**rest, **fixed}, "entropy.schedule")
    return made


def make_controller(values: Mapping[str, Any]) -> Controller:
    """``pid``, ``sign`` or ``open_loop``."""
    kinds: dict[str, type] = {"pid": PID, "sign": SignRule, "open_loop": OpenLoop}
    kind, rest = _kind(values, "kind", "entropy.controller", list(kinds))
    made: Controller = build(kinds[kind], rest, "entropy.controller")
    return made


@dataclass(frozen=True)
class _ActuatorValues:
    name: str
    start: float | None = None
    low: float | None = None
    high: float | None = None


def make_actuator(values: Mapping[str, Any]) -> Actuator:
    """An actuator by name, with its own start and bounds where none are given."""
    given = build(_ActuatorValues, values, "entropy.actuator")
    return actuator(given.name, given.start, given.low, given.high)


def _kind(
    values: Mapping[str, Any], key: str, where: str, known: list[str]
) -> tuple[str, dict[str, Any]]:
    rest = dict(values)
    kind = rest.pop(key, None)
    if kind not in known:
        if kind is None:
            raise SaltireError(f"{where}.{key} must be given: one of {', '.join(known)}.")
        raise SaltireError(unknown_key(f"{where}.{key} {kind!r}", str(kind), known))
    return kind, rest
