"""The curriculum: which prompts are drawn, in which phase."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.rl.curriculum import Curriculum, CurriculumConfig


@given(size=st.integers(1, 50), count=st.integers(1, 20), seed=st.integers(0, 99))
def test_neutral_order_shows_each_prompt_once_per_epoch(size, count, seed) -> None:
    curriculum = Curriculum(size, seed)
    drawn = [
        i for step in range(-(-2 * size // count)) for i in curriculum.draw(step, count, "stable")
    ]
    for epoch in range(2):
        assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("order", ["neutral", "easy_first", "hard_first"])
def test_a_draw_depends_on_seed_step_and_rates_alone(order) -> None:
    config = CurriculumConfig(order)
    first = Curriculum(40, 7, config)
    first.observe([1, 2, 3], [0.0, 0.5, 1.0])
    for step in range(5):
        first.draw(step, 8, "stable")
    second = Curriculum(40, 7, config)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.draw(9, 8, "anneal") == first.draw(9, 8, "anneal")
    assert Curriculum(40, 8, config).draw(9, 8, "anneal") != second.draw(9, 8, "anneal")


@pytest.mark.parametrize(
    ("order", "phase", "favoured"),
    [
        ("easy_first", "stable", "easy"),
        ("easy_first", "anneal", "hard"),
        ("hard_first", "stable", "hard"),
        ("hard_first", "anneal", "easy"),
    ],
)
def test_each_order_favours_its_band_and_shuts_out_none(order, phase, favoured) -> None:
    curriculum = Curriculum(100, 0, CurriculumConfig(order))
    curriculum.observe(range(50), [0.0] * 50)
    curriculum.observe(range(50, 100), [1.0] * 50)
    drawn = Counter(
        "hard" if i < 50 else "easy" for s in range(300) for i in curriculum.draw(s, 10, phase)
    )
    other = {"easy": "hard", "hard": "easy"}[favoured]
    assert drawn[favoured] > 2 * drawn[other] > 0


def test_rates_forget_and_pools_count_all() -> None:
    curriculum = Curriculum(10, 0, CurriculumConfig(memory=0.5))
    curriculum.observe([0, 1], [0.0, 1.0])
    curriculum.observe([0], [1.0])
    assert curriculum.rates == {0: 0.5, 1: 1.0}
    assert curriculum.pools() == {"unseen": 8, "easy": 1, "medium": 1, "hard": 0}


def test_more_prompts_than_there_are_can_be_drawn() -> None:
    assert len(Curriculum(3, 0, CurriculumConfig("easy_first")).draw(0, 8, "stable")) == 8


@pytest.mark.parametrize(
    "make",
    [
        lambda: CurriculumConfig(order="random"),  # type: ignore[arg-type]
        lambda: CurriculumConfig(hard_below=0.8, easy_above=0.2),
        lambda: Curriculum(0, 0),
    ],
)
def test_impossible_curricula_are_refused(make) -> None:
    with pytest.raises(SaltireError):
        make()
