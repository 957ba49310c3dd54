"""Has the actuator any authority over entropy, and of which sign? Measured, not assumed.

The gain of the plant is ΔH per unit of the setting. Its sign depends on the task: a larger
ε_high may lower entropy early on, when mostly likely tokens are rewarded. A probe runs the same
updates from the same state at several settings, and fits a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from saltire.errors import SaltireError

Verdict = Literal["positive", "inverted", "none"]


@dataclass(frozen=True)
class Authority:
    """Gain of the plant in nats per unit of the setting, its standard error, and the verdict."""

    actuator: str
    gain: float
    error: float
    span: float
    settings: tuple[float, ...]
    entropies: tuple[float, ...]
    verdict: Verdict
    advice: str

    @property
    def direction(self) -> Literal[-1, 1]:
        """What to give a controller as its ``direction``."""
        return -1 if self.verdict == "inverted" else 1


def fit_line(settings: Sequence[float], entropies: Sequence[float]) -> tuple[float, float]:
    """Slope of the least-squares line and its standard error (infinite for two points or fewer)."""
    n = len(settings)
    mean_u, mean_h = sum(settings) / n, sum(entropies) / n
    spread = sum((u - mean_u) ** 2 for u in settings)
    if spread == 0:
        raise SaltireError("authority probe: all settings are equal; it needs at least two.")
    slope = (
        sum((u - mean_u) * (h - mean_h) for u, h in zip(settings, entropies, strict=True)) / spread
    )
    if n <= 2:
        return slope, math.inf
    left = sum(
        (h - mean_h - slope * (u - mean_u)) ** 2 for u, h in zip(settings, entropies, strict=True)
    )
    return slope, math.sqrt(left / (n - 2) / spread)


def probe(
    actuator: str,
    run: Callable[[float], float],
    settings: Sequence[float],
    *,
    updates_per_rollout: int,
    threshold: float = 1e-4,
) -> Authority:
    """Measure the gain: ``run(u)`` makes the same updates with setting u and returns the entropy.

    ``run`` must start from the same state each time. An effect below ``threshold`` nats over the
    whole span of settings is none: 1e-4 is about the rounding of a mean entropy measured in bf16.
    """
    entropies = tuple(run(setting) for setting in settings)
    if not all(math.isfinite(entropy) for entropy in entropies):
        raise SaltireError(
            f"authority probe: entropies {entropies} at settings {tuple(settings)}; an update has "
            "diverged. Lower the learning rate, or the bounds of the actuator."
        )
    gain, error = fit_line(settings, entropies)
    span = abs(gain) * (max(settings) - min(settings))
    verdict: Verdict = "positive" if gain > 0 else "inverted"
    if span < threshold:
        verdict = "none"
    return Authority(
        actuator, gain, error, span, tuple(settings), entropies, verdict,
        advice(actuator, verdict, updates_per_rollout),
    )  # fmt: skip


def advice(actuator: str, verdict: Verdict, updates_per_rollout: int) -> str:
    """What to do about a verdict; empty where all is well."""
    if verdict == "positive":
        return ""
    if verdict == "inverted":
        return (
            f"a larger {actuator} lowers entropy here: set the controller's direction to -1, "
            "and expect the sign to change as training goes on; entropy_bonus is the safer actuator"
        )
    if actuator == "clip_high" and updates_per_rollout < 2:
        return on_policy_advice()
    return (
        f"{actuator} does not move entropy here: widen its bounds, raise the learning rate, or "
        "choose another actuator such as entropy_bonus"
    )


def on_policy_advice() -> str:
    """The cure where every update is strictly on-policy."""
    return (
        "updates are strictly on-policy: the ratio is always 1, nothing is ever clipped, and "
        "clip_high has no authority over entropy. Make at least 2 updates per rollout "
        "(updates_per_rollout in saltire; num_iterations or steps_per_generation in TRL), or "
        "choose the actuator entropy_bonus"
    )


@dataclass
class ClipWatch:
    """Counts steps in which the upper clip held nothing; tells once when that is too many.

    The check that costs nothing: where ``clip_high`` is the actuator and the share of tokens held
    by the upper clip stays at 0 for ``patience`` steps, the actuator is disconnected.
    """

    patience: int = 5
    idle_steps: int = 0
    told: bool = False

    def observe(self, clipped_share: float, setting: float, high: float) -> str | None:
        """The advice, the first time that it applies; a clip at its upper bound may be idle."""
        idle = clipped_share == 0 and setting < high
        self.idle_steps = self.idle_steps + 1 if idle else 0
        if self.told or self.idle_steps < self.patience:
            return None
        self.told = True
        return on_policy_advice()

    def state_dict(self) -> dict[str, int | bool]:
        """Plain numbers."""
        return {"idle_steps": self.idle_steps, "told": self.told}

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Continue where ``state`` was taken."""
        self.idle_steps, self.told = int(state["idle_steps"]), bool(state["told"])
