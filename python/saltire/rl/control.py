"""The control loop: schedule, controller and actuator together, with one ``state_dict``.

Each step: measure the global entropy, ask the schedule for the target, let the controller move
the actuator, train with the knobs it has set. The loop holds no tensor and knows no framework, so
our trainer, the TRL callback and a driver process can all use it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from saltire.errors import SaltireError
from saltire.rl.actuators import Actuator, Knobs
from saltire.rl.controllers import Controller, ControllerState
from saltire.rl.distributed import all_sum
from saltire.rl.schedules import Phase, Schedule, phase_of

Unit = Literal["nats", "initial"]


@dataclass(frozen=True)
class Reading:
    """One step of the loop, as it is logged."""

    step: int
    entropy: float
    target: float
    error: float
    setting: float
    saturated: bool
    phase: Phase


class EntropyControl:
    """Keeps entropy on a schedule.

    ``unit`` says what the schedule's numbers are: nats, or multiples of the first entropy measured
    (``initial``). ``ceiling`` is the largest entropy there can be, ln V; a target above it is
    refused, since no policy can reach it.
    """

    def __init__(
        self,
        schedule: Schedule,
        controller: Controller,
        actuator: Actuator,
        unit: Unit = "nats",
        ceiling: float = math.inf,
    ) -> None:
        self.schedule = schedule
        self.controller = controller
        self.actuator = actuator
        self.unit = unit
        self.ceiling = ceiling
        self.state: ControllerState = controller.initial(actuator.start)
        self.initial_entropy: float | None = None
        low, high = actuator.bounds
        if not low <= self.state.output <= high:
            raise SaltireError(
                f"actuator {actuator.name}: the controller starts it at {self.state.output}, "
                f"outside its bounds [{low}, {high}]."
            )
        if ceiling <= 0:
            raise SaltireError(
                "entropy control: the vocabulary has one token, so entropy is always 0 and there "
                "is nothing to control. Use a model with a vocabulary of at least 2."
            )
        if unit == "nats":
            self._checked(schedule(0), 0)

    @property
    def setting(self) -> float:
        """The actuator's present setting."""
        return self.state.output

    def knobs(self, knobs: Knobs) -> Knobs:
        """``knobs`` with the actuator's field at its present setting."""
        return self.actuator.apply(knobs, self.setting)

    def target(self, step: int) -> float:
        """The target in nats; with unit ``initial`` it is known after the first measurement."""
        level = self.schedule(step)
        if self.unit == "initial":
            if self.initial_entropy is None:
                raise SaltireError(
                    "entropy control: the target is a multiple of the initial entropy, which has "
                    "not been measured yet. Call observe() first."
                )
            level *= self.initial_entropy
        return self._checked(level, step)

    def observe(self, step: int, entropy: float, metric: float | None = None) -> Reading:
        """Take the global mean entropy (nats) measured at ``step`` and move the actuator.

        ``metric``, where given, goes to a schedule that waits for one. Raises SaltireError for an
        entropy that is not finite, and leaves the loop as it was.
        """
        if not math.isfinite(entropy):
            raise SaltireError(
                f"entropy control: the entropy measured at step {step} is {entropy}. The policy "
                "has diverged: resume from the last checkpoint with a lower learning rate."
            )
        if self.initial_entropy is None:
            self.initial_entropy = entropy
        if metric is not None and hasattr(self.schedule, "observe"):
            self.schedule.observe(step, metric)
        target = self.target(step)
        self.state = self.controller.advance(self.state, target, entropy, self.actuator.bounds)
        return Reading(
            step=step,
            entropy=entropy,
            target=target,
            error=target - entropy,
            setting=self.setting,
            saturated=self.setting in self.actuator.bounds,
            phase=phase_of(self.schedule, step),
        )

    def set_direction(self, direction: Literal[-1, 1]) -> None:
        """Tell the controller the sign that the authority probe has found."""
        if hasattr(self.controller, "direction"):
            self.controller = dataclasses.replace(self.controller, direction=direction)  # type: ignore[type-var]

    def state_dict(self) -> dict[str, Any]:
        """Everything the loop remembers, as plain numbers that JSON can hold."""
        return {
            "controller": self.state.state_dict(),
            "direction": getattr(self.controller, "direction", 1),
            "initial_entropy": self.initial_entropy,
            "schedule": (
                self.schedule.state_dict() if hasattr(self.schedule, "state_dict") else None
            ),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state`` was taken."""
        self.state = ControllerState(**state["controller"])
        self.set_direction(state["direction"])
        self.initial_entropy = state["initial_entropy"]
        if hasattr(self.schedule, "load_state_dict"):
            self.schedule.load_state_dict(state["schedule"])

    def _checked(self, level: float, step: int) -> float:
        if not math.isfinite(level) or level < 0:
            raise SaltireError(
                f"entropy control: the schedule gives a target of {level} at step {step}; a target "
                "is finite and at least 0."
            )
        if level > self.ceiling:
            raise SaltireError(
                f"entropy control: the target at step {step} is {level:.4g} nats, above ln V = "
                f"{self.ceiling:.4g}, the most that this vocabulary allows. Lower the schedule."
            )
        return level


class EntropyMeter:
    """Token-weighted mean entropy over micro-batches and ranks.

    A mean of means would weigh a rank with short completions as much as one with long ones, and
    ranks that each followed their own mean would drift apart; so sums and counts are kept, in
    float64, and added up over the ranks before the one division.
    """

    def __init__(self) -> None:
        self._sums = [0.0, 0.0]

    def add(self, entropy: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Add the entropies (nats) of one micro-batch, those where ``mask`` is true."""
        chosen = entropy.detach() if mask is None else entropy.detach()[mask]
        self._sums[0] += float(chosen.double().sum())
        self._sums[1] += chosen.numel()

    def mean(self) -> float:
        """The mean over all ranks, the same on each, NaN without tokens; starts afresh."""
        total, count = all_sum(self._sums)
        self._sums = [0.0, 0.0]
        return total / count if count else math.nan
