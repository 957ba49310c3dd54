"""Verifiable rewards and the tasks that use them."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.rl.rewards import (
    countdown_reward,
    final_answer,
    find_reward,
    number_reward,
    parse_expression,
)
from saltire.rl.tasks import arithmetic, countdown, read_task


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She has 48 + 24 = 72 clips.\n#### 72", 72),
        ("so the total is 1,234.50 dollars", Fraction(2469, 2)),
        (r"hence \boxed{-3}.", -3),
        ("#### $1,000", 1000),
        ("the first is 5, the answer is 7.", 7),
        ("#### none of these 5", None),
        ("no digits", None),
        ("1/0", None),
        ("", None),
    ],
)
def test_final_answer(text, value) -> None:
    assert final_answer(text) == value


def test_number_reward_compares_values_not_texts() -> None:
    row = {"answer": "work\n#### 1,000"}
    assert number_reward("it is 1000.0", row) == 1
    assert number_reward("it is 1000.1", row) == 0
    assert number_reward("", row) == 0


@given(st.text(max_size=300))
def test_no_text_breaks_a_reward(text) -> None:
    assert number_reward(text, {"answer": 7}) in (0, 1)
    assert countdown_reward(text, {"numbers": [1, 2], "target": 3}) in (0, 1)


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda parts: f"({parts[0]} {parts[1]}{parts[2]})"
    ),
    max_leaves=8,
)


@given(expressions)
def test_parser_agrees_with_python(text) -> None:
    try:
        expected = eval(text.replace("(", "(Fraction(1)*"))  # our own text: digits and operators
    except ZeroDivisionError:
        expected = None
    parsed = parse_expression(text)
    assert (parsed and parsed[0]) == (None if expected is None else Fraction(expected))


@pytest.mark.parametrize(
    "text", ["2+", "(2", "2 3", "2**3", "-2", "", "2)", "a", "(" * 150, "1/(2-2)"]
)
def test_what_is_not_an_expression_has_no_value(text) -> None:
    assert parse_expression(text) is None


def test_countdown_wants_every_number_once_and_the_target() -> None:
    row = {"numbers": [3, 4, 5], "target": 17}
    assert countdown_reward("think\n3*4+5", row) == 1
    assert countdown_reward("<answer> (4*3) + 5 = 17 </answer> so", row) == 1
    assert countdown_reward("3*4+5+0", row) == 0
    assert countdown_reward("12+5", row) == 0
    assert countdown_reward("3*5+4", row) == 0


@given(st.integers(2, 6), st.integers(1, 20), st.integers(0, 9))
def test_every_countdown_row_is_solved_by_its_solution(numbers, largest, seed) -> None:
    for row in countdown(5, numbers, largest, seed).rows:
        assert countdown_reward(row["solution"], row) == 1


def test_arithmetic_rows_are_right() -> None:
    task = arithmetic(50, digits=3)
    for row in task.rows:
        assert number_reward(str(eval(task.prompt(row)[:-1])), row) == 1


def test_gsm8k_file_is_read_and_bad_rows_are_named(tmp_path) -> None:
    good = {"question": "How many?", "answer": "It is 2.\n#### 2"}
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(good) + "\n\n" + json.dumps(good) + "\n")
    assert len(read_task(file).rows) == 2
    assert len(read_task(file, limit=1).rows) == 1
    for bad in ({"question": "How many?"}, {"answer": "2"}, {"question": "?", "answer": "x"}, [1]):
        file.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(SaltireError, match="line 2"):
            read_task(file)
    file.write_text("{")
    with pytest.raises(SaltireError, match="line 1"):
        read_task(file)
    file.write_text("")
    with pytest.raises(SaltireError, match="no rows"):
        read_task(file)
    with pytest.raises(SaltireError, match="no dataset"):
        read_task(tmp_path / "absent.jsonl")


def test_split_holds_out_the_last_rows() -> None:
    train, held = arithmetic(10).split(3)
    assert (len(train.rows), len(held.rows)) == (7, 3)
    with pytest.raises(SaltireError):
        arithmetic(10).split(10)


def test_rewards_are_found_by_name_or_import_path() -> None:
    assert find_reward("number") is number_reward
    assert find_reward("saltire.rl.rewards:countdown_reward") is countdown_reward
    for name in ("nosuch", "saltire.rl.rewards:nosuch", "no.such.module:f"):
        with pytest.raises(SaltireError):
            find_reward(name)
