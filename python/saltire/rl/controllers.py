"""Controllers: from the entropy error to the setting of an actuator.

Each is a frozen set of gains with two pure functions, ``initial(start)`` and
``advance(state, target, entropy, bounds)``; the state is a small frozen value that goes into a
checkpoint as a plain dict. The error is e = H* − Ĥ, positive while entropy is too low, and every
actuator is oriented such that a larger setting is meant to raise entropy; ``direction`` = −1 turns
that round where the authority probe has found the opposite.

The paper says PID and publishes no gains; those here are ours.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from saltire.errors import SaltireError

Bounds = tuple[float, float]
Direction = Literal[-1, 1]


@dataclass(frozen=True)
class ControllerState:
    """What a controller remembers from step to step.

    ``output`` is the last setting; ``base`` is u0 + d·ki·Σe, the part that integrates;
    ``smooth_error`` the running average of e; ``steps`` how many steps it has taken.
    """

    output: float
    base: float
    smooth_error: float = 0.0
    steps: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return dataclasses.asdict(self)


class Controller(Protocol):
    """Anything with these two pure functions."""

    def initial(self, start: float) -> ControllerState:
        """The state before the first step, with the actuator at ``start``."""

    def advance(
        self, state: ControllerState, target: float, entropy: float, bounds: Bounds
    ) -> ControllerState:
        """The next state, whose ``output`` lies within ``bounds``."""


@dataclass(frozen=True)
class PID:
    """u = u0 + d·(kp·e + ki·Σe + kd·Δs), clipped; s ← smoothing·s + (1 − smoothing)·e.

    Anti-windup: while the output is held (by a bound, or by ``slew``, the limit of |Δu| per step)
    and the error pushes further out, Σe grows only as far as the output can follow. With
    ``relative`` the error is e / H*, so that the gains need no change while the target is annealed.
    """

    kp: float = 1.0
    ki: float = 0.1
    kd: float = 0.0
    start: float | None = None
    slew: float = math.inf
    smoothing: float = 0.8
    relative: bool = True
    direction: Direction = 1

    def __post_init__(self) -> None:
        _check_gains(kp=self.kp, ki=self.ki, kd=self.kd)
        _check_direction(self.direction)
        if not self.slew > 0:
            raise SaltireError(f"controller: slew is {self.slew}; it must be above 0.")
        if not 0 <= self.smoothing < 1:
            raise SaltireError(
                f"controller: smoothing is {self.smoothing}; it must be at least 0 and below 1."
            )

    def initial(self, start: float) -> ControllerState:
        """At ``self.start`` where it is given, else at the actuator's own start."""
        start = start if self.start is None else self.start
        return ControllerState(output=start, base=start)

    def advance(
        self, state: ControllerState, target: float, entropy: float, bounds: Bounds
    ) -> ControllerState:
        """One step of the formula above."""
        error = target - entropy
        if self.relative:
            error /= max(target, MIN_RELATIVE_TARGET)
        push = self.direction * error
        # The first error starts the average: an average from 0 would fake a derivative.
        smooth, slope = error, 0.0
        if state.steps:
            smooth = self.smoothing * state.smooth_error + (1 - self.smoothing) * error
            slope = smooth - state.smooth_error
        base = state.base + self.ki * push
        wanted = base + self.kp * push + self.direction * self.kd * slope
        output = _limit(wanted, state.output, self.slew, bounds)
        excess = wanted - output
        if excess * push > 0:  # take back what only winds up, but never more than was added
            base -= math.copysign(min(abs(excess), abs(self.ki * push)), excess)
        return ControllerState(output, base, smooth, state.steps + 1)


@dataclass(frozen=True)
class SignRule:
    """u ← u + d·step·sign(e), clipped; it stands still while |e| ≤ deadband·H*.

    The rule of MAI-Thinking-1 and of Skywork-OR1: robust where the gain is unknown, and slow.
    """

    step: float
    deadband: float = 0.0
    start: float | None = None
    direction: Direction = 1

    def __post_init__(self) -> None:
        _check_gains(step=self.step, deadband=self.deadband)
        _check_direction(self.direction)

    def initial(self, start: float) -> ControllerState:
        """At ``self.start`` where it is given, else at the actuator's own start."""
        start = start if self.start is None else self.start
        return ControllerState(output=start, base=start)

    def advance(
        self, state: ControllerState, target: float, entropy: float, bounds: Bounds
    ) -> ControllerState:
        """One step of ``step`` towards the target, or none."""
        error = target - entropy
        move = 0.0
        if abs(error) > self.deadband * target:
            move = self.direction * math.copysign(self.step, error)
        output = _limit(state.output + move, state.output, math.inf, bounds)
        return ControllerState(output, output, error, state.steps + 1)


@dataclass(frozen=True)
class OpenLoop:
    """The actuator stays at ``setting``: no control, for baselines; entropy is still logged."""

    setting: float | None = None

    def initial(self, start: float) -> ControllerState:
        """At ``setting`` where it is given, else at the actuator's own start."""
        start = start if self.setting is None else self.setting
        return ControllerState(output=start, base=start)

    def advance(
        self, state: ControllerState, target: float, entropy: float, bounds: Bounds
    ) -> ControllerState:
        """The same output, whatever the error."""
        return ControllerState(state.output, state.base, target - entropy, state.steps + 1)


# Below this target (nats) e / H* would amplify the noise of the measured mean: at H* = 0.01 the
# mean over some thousand tokens is still known to about a tenth of it.
MIN_RELATIVE_TARGET = 0.01


def _limit(wanted: float, last: float, slew: float, bounds: Bounds) -> float:
    low, high = bounds
    return min(high, max(low, min(last + slew, max(last - slew, wanted))))


def _check_gains(**gains: float) -> None:
    for name, gain in gains.items():
        if not math.isfinite(gain) or gain < 0:
            raise SaltireError(
                f"controller: {name} is {gain}; it must be finite and at least 0. "
                "For a plant that answers the other way round set direction to -1."
            )


def _check_direction(direction: int) -> None:
    if direction not in (-1, 1):
        raise SaltireError(f"controller: direction is {direction}; it must be 1 or -1.")
