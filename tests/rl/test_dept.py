"""DEPT against the figures that follow from its formulas."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.rl.dept import (
    Dept,
    DeptConfig,
    RoleBaselines,
    impasse,
    match_entropy,
    shaped_advantage,
    stagnation,
)
from saltire.rl.match_outcome import MatchOutcome

OUTCOMES = {"g": ("player 0", "player 1", "draw")}
ROLES = {"g": ("player 0", "player 1")}
PAIR = ("player 0", "player 1")
LN3 = math.log(3)
# lambda at sigma = 1 for outcomes (.5, .5, 0), (.8, .1, .1) and (.9, .05, .05) of three.
SPLIT = math.sqrt(1 - math.log(2) / LN3)
EIGHTY = math.sqrt(1 - (0.8 * math.log(1.25) + 0.2 * math.log(10)) / LN3)
NINETY = math.sqrt(1 - (0.9 * math.log(10 / 9) + 0.1 * math.log(20)) / LN3)
WIN, LOSS, DRAW = ("player 0", (1.0, -1.0)), ("player 1", (-1.0, 1.0)), ("draw", (0.0, 0.0))


def match(end, forfeits=(), rewards=None):
    label, usual = end
    return MatchOutcome("g", label, PAIR, rewards or usual, forfeits)


def dept(**config):
    return Dept(OUTCOMES, ROLES, DeptConfig(**config))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((1, 1, 0), SPLIT),
        ((1, 1), 0.0),
        ((8, 1, 1), EIGHTY),
        ((18, 1, 1), NINETY),
        ((5, 0, 0), 1.0),
        ((3, 3, 3), 0.0),
    ],
)
def test_lambda_of_a_stagnant_role_depends_on_how_matches_end(counts, expected):
    assert impasse(1.0, match_entropy(counts)) == pytest.approx(expected, abs=1e-6)


def test_published_roundings_of_lambda():
    rounded = [
        round(impasse(1.0, match_entropy(c)), 2) for c in ((1, 1, 0), (1, 1), (8, 1, 1), (18, 1, 1))
    ]
    assert rounded == [0.61, 0.0, 0.65, 0.80]


@settings(deadline=None)
@given(st.floats(1e-4, 0.01), st.booleans())
def test_a_reward_that_drifts_by_c_per_batch_parts_the_averages_by_18_c(drift, down):
    # An average with weight a on the past trails a ramp by a / (1 - a) steps: 1 and 19.
    baselines, sign = RoleBaselines(), -1 if down else 1
    for step in range(1000):
        baselines.update(sign * drift * step, DeptConfig())
    assert abs(baselines.fast - baselines.slow) == pytest.approx(18 * drift, rel=1e-6)


def test_shaped_advantages_push_from_a_dominant_draw_to_anything_else():
    weight, highest, lowest = 0.9, 0.3, -0.3
    draw = shaped_advantage(0.0, 0.0, weight, highest)
    win = shaped_advantage(1.0, 0.0, weight, lowest)
    loss = shaped_advantage(-1.0, 0.0, weight, lowest)
    assert (draw, win, loss) == pytest.approx((-0.27, 1.27, -0.73), abs=1e-6)


def test_the_whole_path_from_matches_to_advantages():
    state = dept()
    state.baselines["g", "player 0"] = RoleBaselines(0.1, 0.0, 0.3, -0.3)
    state.baselines["g", "player 1"] = RoleBaselines(-0.1, 0.0, 0.2, -0.2)
    batch = [match(DRAW)] * 18 + [match(WIN), match(LOSS)]
    got = state.advantages(batch)
    weight = (1 - math.tanh(0.1)) * NINETY
    assert got[0] == pytest.approx((-weight * 0.3, -weight * 0.2), abs=1e-6)
    assert got[18] == pytest.approx((1 + weight * 0.3, -1 + weight * 0.2), abs=1e-6)
    assert got[19] == pytest.approx((-1 + weight * 0.3, 1 + weight * 0.2), abs=1e-6)
    # 18 draws, a win and a loss: mean reward 0 for both roles.
    assert state.baselines["g", "player 0"] == RoleBaselines(0.05, 0.0, 0.3, -0.3)


def test_baselines_are_read_before_they_move():
    state = dept()
    assert state.advantages([match(WIN)] * 4)[0] == (1.0, -1.0)
    assert state.baselines["g", "player 0"] == RoleBaselines(0.5, pytest.approx(0.05), 0.5, 0.0)
    assert state.baselines["g", "player 1"] == RoleBaselines(-0.5, pytest.approx(-0.05), 0.0, -0.5)


def test_advantages_keep_their_mean():
    state = dept()
    for _ in range(3):
        state.advantages([match(WIN), match(LOSS), match(WIN)])
    for _ in range(120):
        got = state.advantages([match(DRAW)] * 8)
    assert all(a == got[0] for a in got)
    assert got[0][0] < -0.1  # a batch of nothing but draws is pushed away from draws


def test_without_margin_draws_from_the_first_batch_give_no_push_and_with_it_they_do():
    plain, guarded = dept(), dept(margin=0.2)
    for _ in range(5):
        none, some = plain.advantages([match(DRAW)] * 8), guarded.advantages([match(DRAW)] * 8)
    assert none[0] == (0.0, 0.0)
    assert some[0] == pytest.approx((-0.2, -0.2))


def test_margin_keeps_pushing_the_role_that_always_wins():
    plain, guarded = dept(), dept(margin=0.2)
    for _ in range(300):
        fades, stays = plain.advantages([match(WIN)] * 8), guarded.advantages([match(WIN)] * 8)
    assert fades[0][0] == pytest.approx(0.0, abs=1e-3)
    assert stays[0][0] == pytest.approx(-0.2, abs=1e-3)


def test_a_scale_below_one_lets_small_divergences_count():
    baselines = RoleBaselines(0.18, 0.0)
    assert stagnation(baselines) == pytest.approx(1 - math.tanh(0.18), abs=1e-12)
    assert stagnation(baselines, 0.18) == pytest.approx(1 - math.tanh(1), abs=1e-12)


def test_forfeits_teach_their_player_and_leave_the_baselines_alone():
    state = dept()
    forfeit = match(WIN, forfeits=(1,), rewards=(0.0, -1.5))
    got = state.advantages([forfeit] * 7)
    assert got[0] == (0.0, -1.5)
    assert all(b == RoleBaselines() for b in state.baselines.values())
    assert state.report()["dept/g/entropy"] == 1.0


def test_a_forfeit_never_earns_more_than_losing():
    state = dept()
    for _ in range(100):
        state.advantages([match(WIN)] * 8)
    batch = [match(WIN)] * 6 + [match(LOSS), match(WIN, (1,), (0.0, -1.5))]
    got = state.advantages(batch)
    assert got[-1][1] == pytest.approx(got[0][1] - 0.5)
    assert got[0][1] < got[-2][1]


def test_a_rare_ordinary_loss_never_earns_after_format_errors():
    state = dept()
    for _ in range(50):
        state.advantages([match(WIN, (1,), (0.0, -1.5))] * 4 + [match(DRAW)] * 4)
    got = state.advantages([match(DRAW)] * 31 + [match(LOSS)])
    assert got[-1][0] <= -0.99


def test_roles_of_unequal_numbers_count_by_their_means():
    table = Dept({"u": ("civilians", "spies")}, {"u": ("civilian", "spy")})
    roles = ("civilian", "spy", "civilian", "civilian")
    table.advantages([MatchOutcome("u", "civilians", roles, (1.0, -1.0, 1.0, 1.0))])
    assert table.baselines["u", "civilian"].fast == 0.5
    assert table.baselines["u", "spy"].fast == -0.5


def test_games_do_not_touch_each_other():
    both = Dept({**OUTCOMES, "h": ("a", "b")}, {**ROLES, "h": PAIR})
    both.advantages([match(WIN)] * 3)
    assert both.baselines["h", "player 0"] == RoleBaselines()
    assert both.report()["dept/h/entropy"] == 1.0


ends = st.lists(st.sampled_from([WIN, LOSS, DRAW]), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.lists(ends, min_size=1, max_size=6))
def test_lambda_and_extremes_stay_in_their_bounds(batches):
    state = dept()
    for batch in batches:
        state.advantages([match(end) for end in batch])
        for b in state.baselines.values():
            assert -1 <= b.lowest <= b.fast <= b.highest <= 1
            assert 0 <= impasse(stagnation(b), match_entropy([len(batch), 1, 0])) <= 1
        assert 0 <= state.report()["dept/g/player 0/lambda"] <= 1


@settings(deadline=None)
@given(st.lists(ends, min_size=1, max_size=4), st.lists(ends, min_size=1, max_size=4))
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(before, after):
    whole, resumed = dept(margin=0.1), dept(margin=0.1)
    for batch in before:
        whole.advantages([match(end) for end in batch])
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for batch in after:
        matches = [match(end) for end in batch]
        assert whole.advantages(matches) == resumed.advantages(matches)
    assert whole.state_dict() == resumed.state_dict()


@settings(deadline=None)
@given(ends, ends)
def test_two_ranks_decide_as_one(left, right):
    """Each rank's reduce adds the other's vector, as all_reduce does."""
    sent = []

    def record(values):
        sent.append(values)
        return values

    for part in (left, right):
        Dept(OUTCOMES, ROLES, reduce=record).advantages([match(end) for end in part])
    total = [a + b for a, b in zip(*sent, strict=True)]
    one = dept()
    expected = one.advantages([match(end) for end in left + right])
    rank0 = Dept(OUTCOMES, ROLES, reduce=lambda values: total)
    assert rank0.advantages([match(end) for end in left]) == expected[: len(left)]
    assert rank0.state_dict() == one.state_dict()


def test_a_state_of_other_games_or_settings_is_refused():
    state = dept().state_dict()
    with pytest.raises(SaltireError, match="Resume with the same settings"):
        Dept({"h": ("a", "b")}, {"h": PAIR}).load_state_dict(state)
    with pytest.raises(SaltireError, match="Resume with the same settings"):
        dept(scale=0.5).load_state_dict(state)
    with pytest.raises(SaltireError, match="not one of DEPT's"):
        dept().load_state_dict({"averages": []})


def test_a_game_with_one_outcome_is_refused():
    with pytest.raises(SaltireError, match="at least two outcomes"):
        Dept({"g": ("draw",)}, ROLES)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (MatchOutcome("x", "draw", PAIR, (0.0, 0.0)), "declared are"),
        (MatchOutcome("g", "tie", PAIR, (0.0, 0.0)), "its outcomes are"),
        (MatchOutcome("g", "draw", ("player 0", "spy"), (0.0, 0.0)), "one reward is needed"),
        (MatchOutcome("g", "draw", PAIR, (0.0,)), "one reward is needed"),
    ],
)
def test_an_undeclared_match_is_refused(bad, why):
    with pytest.raises(SaltireError, match=why):
        dept().advantages([bad])


@pytest.mark.parametrize(
    "config", [{"fast": 0.95, "slow": 0.5}, {"slow": 1.0}, {"scale": 0.0}, {"margin": -0.1}]
)
def test_senseless_settings_are_refused(config):
    with pytest.raises(SaltireError):
        DeptConfig(**config)
