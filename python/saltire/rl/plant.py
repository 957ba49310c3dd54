"""The authority probe on a real policy: the same updates at several settings, each undone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from saltire.rl.authority import Authority, probe
from saltire.rl.checkpoint import trained
from saltire.rl.control import EntropyControl
from saltire.rl.policy import Policy

SPREAD = 0.25  # how far from its start the probe moves an actuator, as a share of its range


def measure_authority(
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    control: EntropyControl,
    updates_per_rollout: int,
    learn: Callable[[float], None],
    entropy: Callable[[], float],
) -> Authority | None:
    """Probe ``control``'s actuator around its present setting, and tell the controller the sign.

    ``learn(setting)`` makes one rollout's updates; ``entropy()`` measures the mean entropy of the
    same tokens afterwards. Weights and optimiser are put back each time. None for the temperature,
    which acts on sampling alone and has a sign that is known.
    """
    if control.actuator.name == "temperature":
        return None
    low, high = control.actuator.bounds
    middle, reach = control.setting, SPREAD * (high - low)
    settings = sorted({max(low, middle - reach), middle, min(high, middle + reach)})

    def run(setting: float) -> float:
        with unchanged(policy, optimiser):
            learn(setting)
            return entropy()

    found = probe(control.actuator.name, run, settings, updates_per_rollout=updates_per_rollout)
    if found.verdict != "none":
        control.set_direction(found.direction)
    return found


@contextlib.contextmanager
def unchanged(policy: Policy, optimiser: torch.optim.Optimizer) -> Iterator[None]:
    """Whatever happens within, trained weights and optimiser are afterwards as they were before."""
    parameters = [parameter for _, parameter in trained(policy)]
    weights = [parameter.detach().clone() for parameter in parameters]
    moments: dict[torch.Tensor, dict[str, Any]] = {
        parameter: {
            key: value.clone() if isinstance(value, torch.Tensor) else value
            for key, value in optimiser.state[parameter].items()
        }
        for parameter in parameters
        if parameter in optimiser.state
    }
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, weight in zip(parameters, weights, strict=True):
                parameter.copy_(weight)
        optimiser.state.clear()
        optimiser.state.update(moments)
