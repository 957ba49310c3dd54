"""The advantages that DEPT is compared with."""

from __future__ import annotations

import json

import pytest

from saltire.errors import SaltireError
from saltire.rl.match_outcome import MatchOutcome
from saltire.rl.role_baselines import NoBaseline, RoleAverage, RoleGroup

PAIR = ("player 0", "player 1")


def match(reward):
    return MatchOutcome("g", "any", PAIR, (reward, -reward))


def test_role_average_is_read_before_it_moves():
    rae = RoleAverage({"g": PAIR})
    assert rae.advantages([match(1.0), match(0.0)]) == [(1.0, -1.0), (0.0, 0.0)]
    assert rae.averages == pytest.approx({("g", "player 0"): 0.025, ("g", "player 1"): -0.025})
    assert rae.advantages([match(0.0)])[0] == pytest.approx((-0.025, 0.025))


def test_role_average_of_a_constant_reward_leaves_no_advantage():
    rae = RoleAverage({"g": PAIR})
    for _ in range(400):
        last = rae.advantages([match(1.0)])
    assert last[0] == pytest.approx((0.0, 0.0), abs=1e-6)


def test_role_average_resumes_bit_for_bit():
    rae, again = RoleAverage({"g": PAIR}), RoleAverage({"g": PAIR})
    rae.advantages([match(0.3)])
    again.load_state_dict(json.loads(json.dumps(rae.state_dict())))
    assert rae.advantages([match(0.7)]) == again.advantages([match(0.7)])
    with pytest.raises(SaltireError, match="same settings"):
        RoleAverage({"h": PAIR}).load_state_dict(rae.state_dict())


def test_groups_are_centred_and_scaled_per_role():
    got = RoleGroup().advantages([match(1.0), match(1.0), match(-1.0), match(-1.0)])
    assert [a for a, _ in got] == pytest.approx([1, 1, -1, -1], abs=1e-5)
    assert sum(b for _, b in got) == pytest.approx(0, abs=1e-9)


def test_groups_without_differences_give_nothing():
    assert RoleGroup().advantages([match(1.0)] * 4) == [(0.0, 0.0)] * 4


def test_no_baseline_is_the_reward():
    assert NoBaseline().advantages([match(0.5)]) == [(0.5, -0.5)]
