"""Controllers, on plants whose answer is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.rl.controllers import PID, OpenLoop, SignRule

BOUNDS = (0.0, 2.5)


def drive(controller, gain: float, target, steps: int, start: float, drift: float = 0.0):
    """A plant that integrates: H ← H + gain·(u − 1) + drift. Returns the entropies."""
    state, entropy, entropies = controller.initial(1.0), start, []
    for step in range(steps):
        state = controller.advance(state, target(step), entropy, BOUNDS)
        entropy = max(0.0, entropy + gain * (state.output - 1.0) + drift)
        entropies.append(entropy)
    return entropies


@given(
    kp=st.floats(0, 100),
    ki=st.floats(0, 100),
    kd=st.floats(0, 100),
    slew=st.floats(0.01, 10),
    direction=st.sampled_from([-1, 1]),
    relative=st.booleans(),
    trace=st.lists(st.tuples(st.floats(0, 12), st.floats(0, 12)), min_size=1, max_size=30),
)
def test_pid_never_leaves_its_bounds_nor_outruns_its_slew(
    kp, ki, kd, slew, direction, relative, trace
) -> None:
    pid = PID(kp, ki, kd, slew=slew, direction=direction, relative=relative)
    state = pid.initial(1.0)
    for target, entropy in trace:
        after = pid.advance(state, target, entropy, BOUNDS)
        assert BOUNDS[0] <= after.output <= BOUNDS[1]
        assert abs(after.output - state.output) <= slew + 1e-9
        state = after


@given(start=st.floats(0.2, 3.0), target=st.floats(0.5, 2.0), drift=st.floats(-0.02, 0.02))
def test_pid_settles_on_the_target_despite_a_constant_drift(start, target, drift) -> None:
    entropies = drive(PID(kp=1.0, ki=0.05), 0.05, lambda _: target, 400, start, drift)
    assert entropies[-1] == pytest.approx(target, rel=0.02)


def test_integral_removes_the_offset_that_proportional_control_leaves() -> None:
    offset = [
        abs(drive(PID(kp=1.0, ki=ki), 0.05, lambda _: 1.0, 400, 1.0, -0.02)[-1] - 1.0)
        for ki in (0.0, 0.05)
    ]
    assert offset[0] > 0.2
    assert offset[1] < 0.02


def test_pid_follows_an_annealed_target() -> None:
    target = lambda step: 1.0 - 0.9 * min(1.0, step / 300)  # noqa: E731
    entropies = drive(PID(kp=2.0, ki=0.2, relative=False), 0.05, target, 300, 1.0)
    lags = [abs(h - target(i + 1)) for i, h in enumerate(entropies)]
    assert max(lags[50:]) < 0.05


def test_inverted_plant_needs_the_opposite_direction() -> None:
    right = drive(PID(direction=-1), -0.05, lambda _: 1.0, 300, 0.5)
    wrong = drive(PID(direction=1), -0.05, lambda _: 1.0, 300, 0.5)
    assert right[-1] == pytest.approx(1.0, rel=0.05)
    assert abs(wrong[-1] - 1.0) > 0.4


def test_anti_windup_recovers_as_soon_as_the_error_turns() -> None:
    pid = PID(kp=0.1, ki=1.0)
    state = pid.initial(1.0)
    for _ in range(1000):  # hopelessly low entropy: the output is held at its upper bound
        state = pid.advance(state, 1.0, 0.1, BOUNDS)
    assert state.output == BOUNDS[1]
    for _ in range(4):
        state = pid.advance(state, 1.0, 1.9, BOUNDS)
    assert state.output < 1.0


def test_sign_rule_steps_towards_the_target_and_rests_in_its_deadband() -> None:
    rule = SignRule(step=0.25, deadband=0.1)
    up = rule.advance(rule.initial(0.0), 1.0, 0.5, BOUNDS)
    assert up.output == 0.25
    assert rule.advance(up, 1.0, 1.05, BOUNDS).output == 0.25
    assert rule.advance(up, 1.0, 1.5, BOUNDS).output == 0.0


def test_open_loop_stays_put() -> None:
    state = OpenLoop(0.7).initial(0.2)
    for entropy in (0.0, 5.0):
        state = OpenLoop(0.7).advance(state, 1.0, entropy, BOUNDS)
        assert state.output == 0.7


@pytest.mark.parametrize(
    "make",
    [
        lambda: PID(kp=-1.0),
        lambda: PID(ki=math.inf),
        lambda: PID(slew=0.0),
        lambda: PID(smoothing=1.0),
        lambda: PID(direction=0),  # type: ignore[arg-type]
        lambda: SignRule(step=math.nan),
    ],
)
def test_impossible_gains_are_refused(make) -> None:
    with pytest.raises(SaltireError):
        make()
