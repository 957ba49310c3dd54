"""Recipes by name, by file and by effort."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

import yaml

from saltire.errors import SaltireError
from saltire.quant.recipe import TRANSFORMS, Learning, LowRank, Recipe

T = TypeVar("T", bound="LowRank | Learning | Recipe")


@dataclass(frozen=True)
class Effort:
    """What ``--effort`` stands for. samples: of the calibration text, where no number is given:
    what is learned is as good as its text is long. learning: beside that by groups, which
    ``kronecker`` does at every effort."""

    samples: int
    learning: Learning | None = None


EFFORTS = {
    "fast": Effort(16),
    "normal": Effort(128, Learning(epochs=2)),
    "best": Effort(256, Learning(group_steps=30, epochs=4)),
}

_BASE = Recipe("w4a4", 4, 4)
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _BASE,
        replace(_BASE, name="w4a4-g128", group=128),
        replace(_BASE, name="w4a4kv4", kv_bits=4),
        replace(_BASE, name="w4a8", act_bits=8),
        replace(_BASE, name="w8a8", weight_bits=8, act_bits=8, head_bits=8),
        replace(_BASE, name="w3a4", weight_bits=3),
        replace(_BASE, name="w3a3", weight_bits=3, act_bits=3),
        replace(_BASE, name="w2a4", weight_bits=2),
        replace(_BASE, name="w2a4-g64", weight_bits=2, group=64),
        replace(_BASE, name="w2a8", weight_bits=2, act_bits=8),
        replace(_BASE, name="w2a8-g64", weight_bits=2, act_bits=8, group=64),
        replace(_BASE, name="dam-80", low_rank=LowRank("factored", 0.8)),
        replace(_BASE, name="dam-60", low_rank=LowRank("factored", 0.6)),
        replace(_BASE, name="dam-40", low_rank=LowRank("factored", 0.4)),
        replace(_BASE, name="w4a4-lr", low_rank=LowRank("residual", 1.25)),
        replace(_BASE, name="w2a4-lr", weight_bits=2, low_rank=LowRank("residual", 0.8)),
        replace(
            _BASE, name="w2a8-lr", weight_bits=2, act_bits=8, low_rank=LowRank("residual", 0.8)
        ),
    )
}


def parse_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by name, or from a .yaml file; SaltireError names the nearest ones."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe.endswith((".yaml", ".yml")):
        return read_recipe(Path(recipe))
    return _known(recipe)


def _known(name: str) -> Recipe:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(RECIPES)}."
        raise SaltireError(f"unknown recipe {name!r}. {hint}")
    return RECIPES[name]


def with_effort(recipe: Recipe, effort: str) -> Recipe:
    """The recipe with what an effort learns: ``fast`` closed forms only; ``normal`` and ``best``
    also learn. ``kronecker`` keeps its steps by groups at every effort, or takes those of the
    effort where they are more. SaltireError for another name."""
    if effort not in EFFORTS:
        raise SaltireError(f"effort = {effort!r}; expected one of {', '.join(EFFORTS)}.")
    learning, old = EFFORTS[effort].learning, recipe.learning
    if recipe.transform == "kronecker" and old is not None:
        new = learning or Learning()
        steps = max(new.group_steps, old.group_steps)
        learning = replace(new, group_steps=steps, group_rate=old.group_rate)
    return replace(recipe, learning=learning)


def with_transform(recipe: Recipe, transform: str) -> Recipe:
    """The recipe with another transform of the family; ``kronecker`` gets FlatQuant's learning
    where the recipe learns nothing by groups (see Recipe). SaltireError for an unknown name."""
    if transform not in TRANSFORMS:
        raise SaltireError(f"transform = {transform!r}; expected one of {', '.join(TRANSFORMS)}.")
    return replace(recipe, transform=transform)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file: ``base``, a known name, and fields of Recipe to change.

    ``learning`` and ``low_rank`` are mappings of the fields of Learning and LowRank. Raises
    SaltireError for a file that is missing or no mapping, and for a field by its name.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SaltireError(f"cannot read the recipe {path}: {error}".splitlines()[0]) from None
    if not isinstance(values, dict):
        raise SaltireError(f"{path} holds no mapping; expected lines like 'weight_bits: 4'.")
    base = _known(str(values.pop("base", "w4a4")))
    for name, kind in (("learning", Learning), ("low_rank", LowRank)):
        if isinstance(values.get(name), dict):
            values[name] = _build(kind, values[name], f"{path}, {name}")
    return _build(Recipe, {**_fields(base), "name": path.stem, **values}, str(path))


def _fields(recipe: Recipe) -> dict[str, Any]:
    return {field.name: getattr(recipe, field.name) for field in fields(recipe)}


def _build(kind: type[T], values: dict[Any, Any], where: str) -> T:
    """Make a dataclass from what YAML gave. Fields that are plain values have their own type, an
    int passing for a float; SaltireError names the file and the field."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise SaltireError(f"{where}: unknown field {name!r}; known: {', '.join(hints)}.")
        wanted = str if get_origin(hints[name]) is Literal else hints[name]
        if wanted is float and type(value) is int:
            continue
        if wanted in (bool, int, float, str) and type(value) is not wanted:
            raise SaltireError(f"{where}: {name} = {value!r}; expected a {wanted.__name__}.")
    try:
        return kind(**values)
    except (SaltireError, TypeError) as error:
        raise SaltireError(f"{where}: {error}") from None
