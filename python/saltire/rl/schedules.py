"""Schedules of target entropy: entropy treated like a learning rate, held stable, then annealed.

A schedule is any callable ``step -> target``. Those here are frozen values, pure in the step, so a
resumed run needs nothing saved but the step itself. The one exception is :class:`PlateauAnneal`,
which waits for a metric to stop improving; its few numbers are in its ``state_dict``.

Targets are in nats, or in units of the entropy that the run starts with (see
:class:`saltire.rl.control.EntropyControl`). What the paper (ES, ACL Findings 2026) leaves unsaid,
levels and lengths above all, is chosen here and said so in docs/es.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from saltire.errors import SaltireError

Schedule = Callable[[int], float]
Shape = Literal["linear", "cosine", "exponential"]
Phase = Literal["stable", "anneal"]


def blend(start: float, end: float, fraction: float, shape: Shape) -> float:
    """The level on the way from ``start`` to ``end``; ``fraction`` in [0, 1] of the way is gone.

    ``linear``: s + f(e − s). ``cosine``: half a cosine wave. ``exponential``: s·(e/s)^f, which
    falls by the same ratio at each step and so needs both ends above 0.
    """
    fraction = min(1.0, max(0.0, fraction))
    if shape == "exponential":
        return start * (end / start) ** fraction
    if shape == "cosine":
        fraction = (1 - math.cos(math.pi * fraction)) / 2
    return start + fraction * (end - start)


@dataclass(frozen=True)
class Constant:
    """The same target at every step."""

    level: float

    def __post_init__(self) -> None:
        _check_levels(level=self.level)

    def __call__(self, step: int) -> float:
        return self.level


@dataclass(frozen=True)
class Ramp:
    """From ``start`` at step 0 to ``end`` at step ``steps``, and ``end`` from there on."""

    start: float
    end: float
    steps: int
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        _check_levels(start=self.start, end=self.end)
        _check_shape(self.shape, self.start, self.end)
        _check_count("steps", self.steps)

    def __call__(self, step: int) -> float:
        return blend(self.start, self.end, step / self.steps, self.shape)

    def phase(self, step: int) -> Phase:
        """A ramp anneals from its first step."""
        return "anneal"


@dataclass(frozen=True)
class Cyclic:
    """A cosine wave between ``high`` (at step 0) and ``low``, one wave every ``period`` steps."""

    low: float
    high: float
    period: int

    def __post_init__(self) -> None:
        _check_levels(low=self.low, high=self.high)
        _check_count("period", self.period)
        if self.low > self.high:
            raise SaltireError(f"cyclic schedule: low is {self.low}, above high, {self.high}.")

    def __call__(self, step: int) -> float:
        return self.low + (self.high - self.low) * (
            0.5 + 0.5 * math.cos(2 * math.pi * step / self.period)
        )


@dataclass(frozen=True)
class StableThenAnneal:
    """Held at ``stable`` for (1 − anneal_fraction)·steps, then annealed to ``end`` at ``steps``.

    The paper's winner. Its anneal ratio and end level are not published; 0.3 is ours.
    """

    stable: float
    end: float
    steps: int
    anneal_fraction: float = 0.3
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        _check_levels(stable=self.stable, end=self.end)
        _check_shape(self.shape, self.stable, self.end)
        _check_count("steps", self.steps)
        if not 0 < self.anneal_fraction <= 1:
            raise SaltireError(
                f"stable-then-anneal: anneal_fraction is {self.anneal_fraction}; it must be above "
                "0 and at most 1. For no anneal at all use a constant schedule."
            )

    @property
    def anneal_start(self) -> float:
        """The step, not always whole, at which the anneal begins."""
        return self.steps * (1 - self.anneal_fraction)

    def __call__(self, step: int) -> float:
        gone = (step - self.anneal_start) / (self.steps - self.anneal_start)
        return blend(self.stable, self.end, gone, self.shape)

    def phase(self, step: int) -> Phase:
        """``anneal`` from ``anneal_start`` on."""
        return "anneal" if step >= self.anneal_start else "stable"


@dataclass(frozen=True)
class Piecewise:
    """Straight lines between ``(step, level)`` points; flat before the first and after the last."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        if not self.points:
            raise SaltireError("piecewise schedule: it needs at least one (step, level) point.")
        _check_levels(**{f"level at step {step}": level for step, level in self.points})
        steps = [step for step, _ in self.points]
        if any(later <= earlier for earlier, later in pairwise(steps)):
            raise SaltireError(f"piecewise schedule: steps must rise; they are {steps}.")

    def __call__(self, step: int) -> float:
        first_step, level = self.points[0]
        if step <= first_step:
            return level
        for (left, low), (right, high) in pairwise(self.points):
            if step <= right:
                return blend(low, high, (step - left) / (right - left), "linear")
        return self.points[-1][1]


@dataclass
class PlateauAnneal:
    """Held at ``stable`` until a metric stops improving, then annealed over ``anneal_steps``.

    The metric (Pass@k, say) goes in through :meth:`observe`, higher being better. It has stopped
    when it has not risen by ``min_gain`` above its best for ``patience`` steps.
    """

    stable: float
    end: float
    anneal_steps: int
    patience: int
    min_gain: float = 0.005
    shape: Shape = "linear"
    best: float = field(default=-math.inf, init=False)
    best_step: int = field(default=0, init=False)
    started: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        _check_levels(stable=self.stable, end=self.end)
        _check_shape(self.shape, self.stable, self.end)
        _check_count("anneal_steps", self.anneal_steps)
        _check_count("patience", self.patience)

    def observe(self, step: int, metric: float) -> None:
        """Take the metric measured at ``step``; the anneal may start at this step."""
        if self.started is not None:
            return
        if metric >= self.best + self.min_gain:
            self.best, self.best_step = metric, step
        elif step - self.best_step >= self.patience:
            self.started = step

    def __call__(self, step: int) -> float:
        if self.started is None:
            return self.stable
        return blend(self.stable, self.end, (step - self.started) / self.anneal_steps, self.shape)

    def phase(self, step: int) -> Phase:
        """``anneal`` once the metric has stopped improving."""
        return "stable" if self.started is None else "anneal"

    def state_dict(self) -> dict[str, float | int | None]:
        """Plain numbers; ``best`` is None before the first metric, as JSON has no infinity."""
        best = None if math.isinf(self.best) else self.best
        return {"best": best, "best_step": self.best_step, "started": self.started}

    def load_state_dict(self, state: dict[str, float | int | None]) -> None:
        """Continue where ``state`` was taken."""
        best = state["best"]
        self.best = -math.inf if best is None else float(best)
        self.best_step = int(state["best_step"] or 0)
        self.started = None if state["started"] is None else int(state["started"])


def phase_of(schedule: Schedule, step: int) -> Phase:
    """The entropy phase at ``step``; a schedule that names none is stable throughout."""
    phase = getattr(schedule, "phase", None)
    return phase(step) if phase is not None else "stable"


def schedule_for_goal(k: int, steps: int, stable: float = 1.0, floor: float = 0.1) -> Schedule:
    """A schedule for training towards Pass@k: the larger k, the less is annealed away.

    k = 1 anneals from ``stable`` down to ``floor``·``stable``; the end level rises with log k, and
    from k = 64 on the target is constant. The direction is the paper's finding (Pass@1 wants low
    entropy, Pass@100 high); the line between the two ends is ours.
    """
    _check_count("k", k)
    kept = min(1.0, math.log(k) / math.log(64))
    if kept == 1.0:
        return Constant(stable)
    return StableThenAnneal(stable, stable * (floor + (1 - floor) * kept), steps)


def _check_levels(**levels: float) -> None:
    for name, level in levels.items():
        if not math.isfinite(level) or level < 0:
            raise SaltireError(
                f"entropy schedule: {name} is {level}; a target entropy is finite and at least 0."
            )


def _check_shape(shape: str, start: float, end: float) -> None:
    if shape not in ("linear", "cosine", "exponential"):
        raise SaltireError(
            f"entropy schedule: shape is {shape!r}; choose linear, cosine or exponential."
        )
    if shape == "exponential" and min(start, end) <= 0:
        raise SaltireError(
            f"entropy schedule: an exponential from {start} to {end} never arrives; both ends must "
            "be above 0. Use a small end such as 0.01, or shape linear."
        )


def _check_count(name: str, value: int) -> None:
    if value < 1:
        raise SaltireError(f"entropy schedule: {name} is {value}; it must be at least 1.")
