"""Settings files: what is understood, and how a mistake is named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from saltire.cli.train import apply_change
from saltire.errors import SaltireError
from saltire.rl.config import TrainConfig, make_controller, make_schedule
from saltire.rl.controllers import PID, SignRule
from saltire.rl.schedules import Constant, Piecewise, Ramp, StableThenAnneal
from saltire.settings import build, read_yaml

DOCS = Path(__file__).parents[2] / "docs"
SETTINGS = """
model: default
output: runs/one
steps: 50
task: {kind: countdown, numbers: 4}
update: {learning_rate: 1e-5, algorithm: dr_grpo, betas: [0.9, 0.95]}
lora: {rank: 8, targets: [q_proj]}
entropy:
  schedule: {kind: stable_then_anneal, stable: 0.8, end: 0.1}
  controller: {kind: sign, step: 0.01}
  actuator: {name: entropy_bonus, high: 0.05}
"""


def settings() -> dict:
    return yaml.safe_load(SETTINGS)


def test_settings_are_built_with_their_types() -> None:
    config = build(TrainConfig, settings())
    assert config.update.learning_rate == 1e-5  # text to YAML 1.1, a number to people
    assert config.update.betas == (0.9, 0.95)
    assert config.lora is not None
    assert config.lora.targets == ("q_proj",)
    assert config.curriculum.order == "neutral"
    json.dumps(dataclasses.asdict(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("stpes=5", "did you mean steps"),
        ("update.learnig_rate=1", "update.learnig_rate.*learning_rate"),
        ("steps=many", "steps is 'many'; expected a whole number"),
        ("steps=true", "expected a whole number"),
        ("steps=0", "above 0"),
        ("update.algorithm=ppo", "grpo, dapo, dr_grpo"),
        ("update.minibatches=3", "multiple"),
        ("rollout.samples=1", "at least 2"),
        ("entropy.schedule.kind=wave", "constant"),
        ("entropy.schedule.stabel=1", "did you mean stable"),
        ("entropy.schedule.stable=.inf", "finite"),
        ("entropy.controller.kind=pidd", "did you mean pid"),
        ("entropy.actuator.name=clip", "clip_high"),
        ("entropy.actuator.high=-5", "outside its bounds"),
        ("task.kind=file", "task.path"),
        ("evaluation.ks=[1, 99]", "99"),
        ("lora=yes", "expected keys with values"),
        ("task=countdown", "expected keys with values"),
        ("output=", "output"),
    ],
)
def test_a_wrong_setting_is_named(change, message) -> None:
    values = settings()
    apply_change(values, change)
    with pytest.raises(SaltireError, match=message):
        build(TrainConfig, values)


def test_a_missing_setting_is_named() -> None:
    with pytest.raises(SaltireError, match="task, output must be given"):
        build(TrainConfig, {})


def test_every_kind_of_schedule_and_controller_can_be_written() -> None:
    kinds = {
        "constant": {"level": 1.0},
        "linear": {"start": 1.0, "end": 0.5},
        "cosine": {"start": 1.0, "end": 0.5},
        "exponential": {"start": 1.0, "end": 0.5},
        "cyclic": {"low": 0.5, "high": 1.0, "period": 10},
        "stable_then_anneal": {"stable": 1.0, "end": 0.1},
        "piecewise": {"points": [[0, 1.0], [10, 0.5]]},
        "plateau": {"stable": 1.0, "end": 0.1, "anneal_steps": 10, "patience": 5},
        "goal": {"k": 4},
    }
    made = {kind: make_schedule({"kind": kind, **rest}, 100) for kind, rest in kinds.items()}
    assert made["constant"] == Constant(1.0)
    assert made["cosine"] == Ramp(1.0, 0.5, 100, "cosine")
    assert made["stable_then_anneal"] == StableThenAnneal(1.0, 0.1, 100)
    assert made["piecewise"] == Piecewise(((0, 1.0), (10, 0.5)))
    assert make_schedule(None, 100) is None
    assert make_controller({"kind": "pid", "kp": 2}) == PID(kp=2.0)
    assert make_controller({"kind": "sign", "step": 0.5}) == SignRule(0.5)


@pytest.mark.parametrize(
    "text", ["", "- 1", "a: [", "!!python/object/apply:os.system ['true']", "\0"]
)
def test_a_file_that_is_not_settings_is_refused(tmp_path, text) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(SaltireError):
        read_yaml(file)


def test_an_absent_file_is_refused(tmp_path) -> None:
    with pytest.raises(SaltireError, match="no settings file"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["steps", "=5", "model.x=1", "steps=[1"])
def test_a_change_that_is_not_one_is_refused(text) -> None:
    with pytest.raises(SaltireError, match="--set"):
        apply_change(settings(), text)


def fields_of(kind: type, prefix: str = "") -> list[str]:
    """Names of all settings, ``part.name`` for those of a part."""
    names = []
    for name, hint in get_type_hints(kind).items():
        part = [t for t in (hint, *get_args(hint)) if dataclasses.is_dataclass(t)]
        names += fields_of(part[0], f"{name}.") if part else [prefix + name]
    return names


def test_the_page_lists_every_setting_and_no_other() -> None:
    page = (DOCS / "es.md").read_text().split("## Every setting")[1].split("\n## ")[0]
    rows = [row.split("|") for row in page.splitlines() if row.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`([a-z0-9_.]+)`", row[1])]
    assert sorted(listed) == sorted(fields_of(TrainConfig))


def test_the_example_of_the_docs_can_be_built() -> None:
    config = build(TrainConfig, read_yaml(DOCS / "gsm8k.yaml"))
    assert config.task.kind == "file"
