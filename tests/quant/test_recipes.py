"""Recipes: what is asked for is what is done, and what cannot be is refused where it is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from saltire.errors import SaltireError
from saltire.quant import RECIPES, Recipe, parse_recipe, with_effort, with_transform
from saltire.quant.recipe import KRONECKER_STEPS, Learning, LowRank
from saltire.quant.recipes import EFFORTS

W4A4 = RECIPES["w4a4"]


def read(folder: Path, text: str) -> Recipe:
    path = folder / "mine.yaml"
    path.write_text(text)
    return parse_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning: 5", "learning = 5; expected a Learning .*group_steps, group_rate, epochs"),
        ("learning: []", "learning = \\[\\]; expected a Learning"),
        ("low_rank: residual", "low_rank = 'residual'; expected a LowRank .*kind, share"),
        ("low_rank: {kind: residual, share: .nan}", "mine.yaml, low_rank: share = nan"),
        ("low_rank: {kind: residual, share: .inf}", "share = inf"),
        ("rest_dtype: floaty", "rest_dtype = 'floaty'; expected one of bfloat16, float16, float32"),
        ("rest_dtype: float64", "rest_dtype = 'float64'"),
        ("learning: {group_rate: .nan}", "mine.yaml, learning: group_rate = nan; expected a rate"),
        ("learning: {rate: .inf}", "rate = inf"),
        ("learning: {rate: -1}", "rate = -1"),
        ("learning: {epochs: -1}", "epochs = -1; expected 0"),
        ("learning: {group_steps: -3}", "group_steps = -3; expected 0"),
        ("name: 3", "name = 3; expected a str"),
        ("name: ''", "name = ''; expected some text"),
        ("weight_bits: 4.0", "weight_bits = 4.0; expected a int"),
        ("transform: 3", "transform = 3; expected a str"),
        ("rotation: half", "rotation = 'half'; expected one of none, block, full"),
        ("{rotation: block, block: 48}", "block = 48; expected a power of two of at most 4096"),
        ("block: 8192", "block = 8192"),
        ("block: 0", "block = 0"),
        ("bits_per_weight: .nan", "bits_per_weight = nan"),
        ("budget_mb: .inf", "budget_mb = inf"),
    ],
)
def test_a_field_that_cannot_be_is_refused_by_file_and_name(tmp_path: Path, text, message) -> None:
    with pytest.raises(SaltireError, match=message) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    "values",
    [{"learning": 5}, {"low_rank": {}}, {"rest_dtype": "floaty"}, {"name": 3}, {"block": 48}],
)
def test_what_a_file_may_not_say_code_may_not_either(values) -> None:
    with pytest.raises(SaltireError, match=f"^{next(iter(values))} = "):
        replace(W4A4, **values)


def test_what_can_be_is_read(tmp_path: Path) -> None:
    text = "rest_dtype: float16\nrotation: block\nblock: 4096\nlearning: {rate: 1}\nlow_rank: null"
    recipe = read(tmp_path, text)
    assert (recipe.rest_dtype, recipe.block, recipe.low_rank) == ("float16", 4096, None)
    assert recipe.learning == Learning(rate=1)
    recipe = read(tmp_path, "low_rank: {kind: residual, share: 2}\nbits_per_weight: 0")
    assert recipe.low_rank == LowRank("residual", 2)
    assert not recipe.mixed


def test_however_kronecker_is_asked_for_it_learns(tmp_path: Path) -> None:
    asked = (
        Recipe("mine", 4, 4, transform="kronecker"),
        replace(W4A4, transform="kronecker"),
        with_transform(W4A4, "kronecker"),
        with_transform(with_effort(W4A4, "fast"), "kronecker"),
        read(tmp_path, "transform: kronecker"),
        read(tmp_path, "{transform: kronecker, learning: {epochs: 2}}"),
    )
    for recipe in asked:
        assert recipe.learning is not None
        assert recipe.learning.group_steps == KRONECKER_STEPS
    assert asked[-1].learning.epochs == 2
    ten = read(tmp_path, "{transform: kronecker, learning: {group_steps: 10}}")
    assert ten.learning == Learning(group_steps=10)
    assert read(tmp_path, "transform: hadamard").learning is None


@pytest.mark.parametrize("effort", EFFORTS)
def test_kronecker_learns_by_groups_at_every_effort(effort) -> None:
    learning = Learning(group_steps=50, group_rate=0.02)
    for steps, recipe in (
        (50, with_effort(replace(W4A4, transform="kronecker", learning=learning), effort)),
        (KRONECKER_STEPS, with_effort(with_transform(W4A4, "kronecker"), effort)),
    ):
        assert recipe.learning.group_steps == steps
        wanted = EFFORTS[effort].learning
        assert recipe.learning.epochs == (wanted.epochs if wanted else 0)
    few = replace(W4A4, transform="kronecker", learning=Learning(group_steps=1, group_rate=0.02))
    assert with_effort(few, effort).learning.group_steps == (30 if effort == "best" else 1)
    assert with_effort(few, effort).learning.group_rate == 0.02


def test_an_effort_replaces_what_other_transforms_learn() -> None:
    recipe = replace(W4A4, learning=Learning(group_steps=50))
    assert with_effort(recipe, "fast").learning is None
    assert with_effort(recipe, "normal").learning == EFFORTS["normal"].learning


def test_a_file_is_no_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"base: {path}")
    with pytest.raises(SaltireError, match=r"unknown recipe .*mine\.yaml"):
        parse_recipe(str(path))
