"""The control loop, its meter, its actuators and the authority probe."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.rl.actuators import ACTUATORS, Knobs, actuator
from saltire.rl.authority import ClipWatch, fit_line, probe
from saltire.rl.control import EntropyControl, EntropyMeter
from saltire.rl.controllers import PID, SignRule
from saltire.rl.schedules import Constant, PlateauAnneal, Ramp, StableThenAnneal


def new_control(**values) -> EntropyControl:
    defaults = {
        "schedule": StableThenAnneal(1.0, 0.1, 20),
        "controller": PID(kp=0.5, ki=0.1, kd=0.2, slew=0.3),
        "actuator": actuator("clip_high"),
        "unit": "initial",
    }
    return EntropyControl(**{**defaults, **values})


@pytest.mark.parametrize("name", sorted(ACTUATORS))
def test_each_actuator_sets_its_own_knob_and_no_other(name) -> None:
    knobs = ACTUATORS[name].apply(Knobs(), ACTUATORS[name].high)
    changed = {k for k, v in vars(knobs).items() if v != getattr(Knobs(), k)}
    assert changed == {name}


def test_unknown_actuator_is_refused_with_the_list() -> None:
    with pytest.raises(SaltireError, match="clip_high"):
        actuator("cliphigh")


@given(st.lists(st.floats(0, 5), min_size=2, max_size=40), st.integers(0, 39))
def test_resumed_control_equals_uninterrupted(entropies, cut) -> None:
    cut = min(cut, len(entropies) - 1)
    whole = new_control()
    expected = [whole.observe(i, h) for i, h in enumerate(entropies)]
    first = new_control()
    for i, h in enumerate(entropies[:cut]):
        first.observe(i, h)
    second = new_control()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.observe(i, h) for i, h in enumerate(entropies[cut:], cut)] == expected[cut:]


def test_state_carries_schedule_and_direction() -> None:
    control = new_control(schedule=PlateauAnneal(1.0, 0.1, 10, patience=2))
    control.set_direction(-1)
    for step in range(5):
        control.observe(step, 1.0, metric=0.5)
    again = new_control(schedule=PlateauAnneal(1.0, 0.1, 10, patience=2))
    again.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert again.schedule.started == control.schedule.started == 2
    assert again.controller.direction == -1


def test_targets_in_initial_units_scale_with_the_first_measurement() -> None:
    control = new_control(schedule=Constant(0.5))
    assert control.observe(0, 3.0).target == 1.5
    assert control.observe(1, 1.0).target == 1.5


def test_target_above_ln_v_is_refused() -> None:
    with pytest.raises(SaltireError, match="ln V"):
        new_control(schedule=Constant(5.0), unit="nats", ceiling=math.log(100))
    control = new_control(schedule=Constant(2.0), ceiling=math.log(100))
    with pytest.raises(SaltireError, match="ln V"):
        control.observe(0, 4.0)


def test_callable_with_an_infinite_target_is_refused_at_its_step() -> None:
    control = new_control(schedule=lambda step: math.inf if step == 3 else 1.0, unit="nats")
    control.observe(2, 1.0)
    with pytest.raises(SaltireError, match="step 3"):
        control.observe(3, 1.0)


def test_vocabulary_of_one_is_refused() -> None:
    with pytest.raises(SaltireError, match="one token"):
        new_control(ceiling=math.log(1))


def test_nan_entropy_is_refused_and_leaves_the_state_alone() -> None:
    control = new_control()
    control.observe(0, 1.0)
    before = control.state_dict()
    with pytest.raises(SaltireError, match="step 1"):
        control.observe(1, math.nan)
    assert control.state_dict() == before


@given(
    st.lists(st.lists(st.floats(0, 12), min_size=0, max_size=9), min_size=1, max_size=9).filter(
        lambda batches: any(batches)
    )
)
def test_meter_weighs_tokens_not_micro_batches(batches) -> None:
    meter = EntropyMeter()
    for values in batches:
        tensor = torch.tensor(values, dtype=torch.float64)
        padded = torch.cat([tensor, torch.full((3,), math.nan, dtype=torch.float64)])
        meter.add(padded, ~padded.isnan())
    flat = [value for values in batches for value in values]
    assert meter.mean() == pytest.approx(sum(flat) / len(flat))
    assert math.isnan(meter.mean())  # it starts afresh


@given(gain=st.floats(-3, 3).filter(lambda g: abs(g) > 1e-3), level=st.floats(0, 5))
def test_probe_recovers_gain_and_sign(gain, level) -> None:
    found = probe("entropy_bonus", lambda u: level + gain * u, [0, 0.5, 1], updates_per_rollout=1)
    assert found.gain == pytest.approx(gain)
    assert found.direction == (1 if gain > 0 else -1)
    assert bool(found.advice) == (gain < 0)


def test_probe_of_an_on_policy_clip_tells_the_cure() -> None:
    found = probe("clip_high", lambda _: 1.0, [0.1, 0.5], updates_per_rollout=1)
    assert found.verdict == "none"
    assert "updates_per_rollout" in found.advice
    other = probe("clip_high", lambda _: 1.0, [0.1, 0.5], updates_per_rollout=4)
    assert "updates_per_rollout" not in other.advice


def test_probe_refuses_a_diverged_run() -> None:
    with pytest.raises(SaltireError, match="diverged"):
        probe("temperature", lambda u: math.nan, [0.5, 1], updates_per_rollout=1)


def test_line_through_two_points_has_no_known_error() -> None:
    assert fit_line([0, 1], [1, 3]) == (2, math.inf)
    assert fit_line([0, 1, 2], [1, 3, 5]) == (2, 0)


def test_clip_watch_tells_once_and_only_after_patience() -> None:
    watch = ClipWatch(patience=3)
    told = [watch.observe(0.0, 0.28, 2.5) for _ in range(6)]
    assert [bool(message) for message in told] == [False, False, True, False, False, False]
    busy = ClipWatch(patience=3)
    assert not any(busy.observe(0.01, 0.28, 2.5) for _ in range(6))


def test_sign_rule_brings_entropy_into_a_band() -> None:
    """The loop closed over a plant with the gain of an entropy bonus."""
    control = EntropyControl(
        Ramp(1.0, 0.5, 100), SignRule(0.002), actuator("entropy_bonus"), unit="nats"
    )
    entropy, errors = 1.0, []
    for step in range(200):
        reading = control.observe(step, entropy)
        entropy += 2.0 * reading.setting - 0.01
        errors.append(abs(reading.error))
    assert max(errors[100:]) < 0.15
