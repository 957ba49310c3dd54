"""Actuators: the places where one number acts on entropy.

A setting u is written into :class:`Knobs`, which the loss and the sampler read. Each actuator is
oriented such that a larger u is *meant* to raise entropy; whether it does so on a given task is
for :mod:`saltire.rl.authority` to measure.

- ``clip_high``: ε_high of DAPO's clip-higher. Source: ES, the paper's choice.
- ``entropy_bonus``: the coefficient of +H in the objective; it may be negative.
- ``advantage_shape``: ζ in A⁺·(1 − ζ ln π) and A⁻·(1 + ζ ln π). Source: REPO-R.
- ``sign_weight``: α in A⁺·(1 − α) and A⁻·(1 + α), on likely tokens only. Source: EntroPIC.
- ``temperature``: of sampling, and of the ratio with it.

``clip_high`` acts only where a ratio has left 1, so it needs at least two updates per rollout; the
other four act from the first update. With ``temperature`` the entropy under
control is that of the distribution sampled from.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from saltire.errors import SaltireError


@dataclass(frozen=True)
class Knobs:
    """All that an actuator may set; the defaults leave a plain clipped policy gradient."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_bonus: float = 0.0
    advantage_shape: float = 0.0
    sign_weight: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not math.isfinite(value):
                raise SaltireError(f"knobs: {name} is {value}; it must be finite.")
        if not 0 <= self.clip_low < 1:
            raise SaltireError(f"knobs: clip_low is {self.clip_low}; it must be in [0, 1).")
        if self.clip_high < 0:
            raise SaltireError(f"knobs: clip_high is {self.clip_high}; it must be at least 0.")
        if self.temperature <= 0:
            raise SaltireError(f"knobs: temperature is {self.temperature}; it must be above 0.")


@dataclass(frozen=True)
class Actuator:
    """One field of :class:`Knobs`, where it starts and how far it may go."""

    name: str
    start: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if self.name not in {field.name for field in dataclasses.fields(Knobs)}:
            raise SaltireError(
                f"there is no actuator {self.name!r}; choose one of {', '.join(sorted(ACTUATORS))}."
            )
        if not self.low <= self.start <= self.high:
            raise SaltireError(
                f"actuator {self.name}: it starts at {self.start}, outside its bounds "
                f"[{self.low}, {self.high}]."
            )
        for end in (self.low, self.high):
            dataclasses.replace(Knobs(), **{self.name: end})  # refuses a bound no knob can take

    @property
    def bounds(self) -> tuple[float, float]:
        """Where a controller may put it."""
        return self.low, self.high

    def apply(self, knobs: Knobs, setting: float) -> Knobs:
        """The knobs with this one set."""
        return dataclasses.replace(knobs, **{self.name: setting})


# ε_high: DAPO's 0.28, up to MAI-Thinking-1's 2.5. The other bounds are ours: |ζ| and |α| up to 1
# keep the sign of the advantage for α and for ln π ≥ −1; a bonus beyond ±0.1 drowns advantages of
# about 1.
ACTUATORS = {
    actuator.name: actuator
    for actuator in (
        Actuator("clip_high", start=0.28, low=0.0, high=2.5),
        Actuator("entropy_bonus", start=0.0, low=-0.1, high=0.1),
        Actuator("advantage_shape", start=0.0, low=-1.0, high=1.0),
        Actuator("sign_weight", start=0.0, low=-1.0, high=1.0),
        Actuator("temperature", start=1.0, low=0.5, high=2.0),
    )
}


def actuator(
    name: str, start: float | None = None, low: float | None = None, high: float | None = None
) -> Actuator:
    """The actuator of that name, with its own start and bounds where none are given."""
    known = ACTUATORS.get(name)
    if known is None:
        raise SaltireError(
            f"there is no actuator {name!r}; choose one of {', '.join(sorted(ACTUATORS))}."
        )
    return Actuator(
        name,
        start=known.start if start is None else start,
        low=known.low if low is None else low,
        high=known.high if high is None else high,
    )
