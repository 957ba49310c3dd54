"""``saltire train``: what it prints, what it leaves behind, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from saltire.cli import build_app
from saltire.cli.train import StepLines
from saltire.errors import SaltireError
from saltire.rl.runlog import read_log
from saltire.rl.scratch import character_tokenizer, small_model

runner = CliRunner()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Settings of a short run of a model that cannot calculate, and what the run printed."""
    folder = tmp_path_factory.mktemp("train")
    tokenizer = character_tokenizer()
    small_model(len(tokenizer), hidden=32, heads=2, layers=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    values = {
        "output": str(folder / "run"),
        "model": str(folder / "model"),
        "steps": 2,
        "task": {"kind": "arithmetic", "rows": 20, "held_out": 4, "digits": 1},
        "rollout": {"prompts": 2, "samples": 2, "max_new_tokens": 3},
        "entropy": {
            "schedule": {"kind": "constant", "level": 1.0},
            "actuator": {"name": "entropy_bonus"},
        },
        "evaluation": {"prompts": 2, "samples": 2, "ks": [1]},
        "tensorboard": True,
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    done = runner.invoke(build_app(), ["train", str(path)])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return path, done.output


def test_a_run_tells_what_it_does_and_can_be_resumed(trained) -> None:
    settings, output = trained
    run = settings.parent / "run"
    for text in (
        "16 prompts of arithmetic, 4 held out",
        "our decoder",
        "constant by entropy_bonus",
    ):
        assert text in output
    for text in ("entropy  target actuator", "2/2", "pass@1", "GiB", f"saltire plot {run}"):
        assert text in output
    with pytest.raises(SaltireError, match="--resume"):
        runner.invoke(build_app(), ["train", str(settings)], catch_exceptions=False)
    again = runner.invoke(build_app(), ["train", str(settings), "--resume", "--json"])
    facts = json.loads(again.stdout.splitlines()[-1])  # text for people goes to stderr
    assert facts["memory_mb"] > 50
    assert Path(facts["model"], "config.json").is_file()
    assert len(read_log(run / "log.jsonl")) == 2


def test_tensorboard_holds_every_number_of_the_log(trained) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trained[0].parent / "run"
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for record in read_log(run / "log.jsonl"):
        for name, value in record.items():
            if isinstance(value, float):
                logged = {e.step: e.value for e in events.Scalars(name)}
                assert logged[record["step"]] == pytest.approx(value, rel=1e-6), name


def test_steps_are_shown_once_a_second_and_evaluations_always() -> None:
    shown: list[str] = []

    class Console:
        def print(self, text: str, **_: object) -> None:
            shown.append(text)

    lines = StepLines(Console(), steps=50)  # type: ignore[arg-type]
    for step in range(50):
        lines({"step": step, "entropy": 0.5, **({"pass@1": 0.25} if step == 20 else {})})
    assert [line.split("/")[0].strip() for line in shown] == ["step entropy", "1", "21", "50"]
    assert shown[2].endswith("pass@1 0.250")
