"""Schedules of target entropy."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.rl.schedules import (
    Constant,
    Cyclic,
    Piecewise,
    PlateauAnneal,
    Ramp,
    StableThenAnneal,
    phase_of,
    schedule_for_goal,
)

levels = st.floats(0.001, 20.0)
shapes = st.sampled_from(["linear", "cosine", "exponential"])


@given(start=levels, end=levels, steps=st.integers(1, 500), shape=shapes)
def test_ramp_meets_both_ends_and_moves_one_way(start, end, steps, shape) -> None:
    ramp = Ramp(start, end, steps, shape)
    values = [ramp(step) for step in range(steps + 3)]
    assert values[0] == pytest.approx(start)
    assert values[steps] == values[-1] == pytest.approx(end)
    rising = 1 if end >= start else -1
    assert all(rising * (b - a) >= -1e-9 for a, b in pairwise(values))


def test_exponential_ramp_falls_by_the_same_ratio_at_each_step() -> None:
    ramp = Ramp(1.0, 0.1, 10, "exponential")
    ratios = [ramp(i + 1) / ramp(i) for i in range(10)]
    assert ratios == pytest.approx([ratios[0]] * 10)


@given(
    stable=levels,
    end=levels,
    steps=st.integers(2, 500),
    fraction=st.floats(0.05, 1.0),
    shape=shapes,
)
def test_stable_then_anneal_holds_then_arrives_at_the_last_step(
    stable, end, steps, fraction, shape
) -> None:
    schedule = StableThenAnneal(stable, end, steps, fraction, shape)
    for step in range(steps + 1):
        if phase_of(schedule, step) == "stable":
            assert schedule(step) == pytest.approx(stable)
        assert min(stable, end) - 1e-9 <= schedule(step) <= max(stable, end) + 1e-9
    assert schedule(steps) == pytest.approx(end)


@given(low=st.floats(0, 5), rise=st.floats(0, 5), period=st.integers(1, 90), step=st.integers(0))
def test_cyclic_repeats_and_stays_between_its_ends(low, rise, period, step) -> None:
    schedule = Cyclic(low, low + rise, period)
    assert low - 1e-6 <= schedule(step) <= low + rise + 1e-6
    assert schedule(step % 10_000 + period) == pytest.approx(schedule(step % 10_000), abs=1e-6)
    assert schedule(0) == pytest.approx(low + rise)


def test_piecewise_goes_through_its_points_and_is_flat_outside() -> None:
    schedule = Piecewise(((10, 1.0), (20, 3.0), (40, 2.0)))
    assert [schedule(s) for s in (0, 10, 15, 20, 30, 40, 99)] == [1, 1, 2, 3, 2.5, 2, 2]


def test_plateau_anneal_starts_when_the_metric_stops_and_not_before() -> None:
    schedule = PlateauAnneal(stable=1.0, end=0.0, anneal_steps=10, patience=5)
    for step in range(20):
        schedule.observe(step, 0.02 * step)
    assert schedule.started is None
    for step in range(20, 30):
        schedule.observe(step, 0.3)
    assert schedule.started == 19 + 5
    assert schedule(24) == 1.0
    assert schedule(29) == pytest.approx(0.5)
    assert schedule(99) == 0.0


def test_plateau_anneal_resumed_equals_uninterrupted() -> None:
    metrics = [0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3]
    whole = PlateauAnneal(1.0, 0.1, 3, patience=2)
    for step, metric in enumerate(metrics):
        whole.observe(step, metric)
    first = PlateauAnneal(1.0, 0.1, 3, patience=2)
    for step, metric in enumerate(metrics[:4]):
        first.observe(step, metric)
    second = PlateauAnneal(1.0, 0.1, 3, patience=2)
    second.load_state_dict(first.state_dict())
    for step, metric in enumerate(metrics[4:], start=4):
        second.observe(step, metric)
    assert second.state_dict() == whole.state_dict()
    assert second.started is not None


def test_larger_k_keeps_more_entropy() -> None:
    ends = [schedule_for_goal(k, steps=100)(100) for k in (1, 2, 8, 32, 64, 256)]
    assert ends == sorted(ends)
    assert ends[0] == pytest.approx(0.1)
    assert ends[-1] == ends[-2] == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(math.inf),
        lambda: Constant(-0.1),
        lambda: Ramp(math.nan, 1.0, 10),
        lambda: Ramp(1.0, 0.0, 10, "exponential"),
        lambda: Ramp(1.0, 0.5, 10, "quadratic"),  # type: ignore[arg-type]
        lambda: Ramp(1.0, 0.5, 0),
        lambda: Cyclic(2.0, 1.0, 10),
        lambda: StableThenAnneal(1.0, 0.1, 100, anneal_fraction=0.0),
        lambda: Piecewise(()),
        lambda: Piecewise(((5, 1.0), (5, 2.0))),
        lambda: PlateauAnneal(1.0, 0.1, 10, patience=0),
        lambda: schedule_for_goal(0, 100),
    ],
)
def test_impossible_schedules_are_refused(make) -> None:
    with pytest.raises(SaltireError):
        make()
