"""EntropySchedule in TRL: a tiny model really trained by GRPOTrainer."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

pytest.importorskip("trl", minversion="1.10")

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from saltire.errors import SaltireError
from saltire.rl.controllers import PID
from saltire.rl.schedules import Constant
from saltire.rl.scratch import character_tokenizer, small_model
from saltire.rl.trl import STATE, EntropySchedule


def even_digits(completions: list[str], **_: object) -> list[float]:
    return [sum(c in "02468" for c in text) / max(1, len(text)) for text in completions]


def trainer_for(folder: Path, **changes: object) -> GRPOTrainer:
    tokenizer = character_tokenizer()
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "max_steps": 4,
        "num_iterations": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "bf16": False,
        **changes,
    }
    return GRPOTrainer(
        model=small_model(len(tokenizer), hidden=32, layers=1),
        reward_funcs=even_digits,
        args=GRPOConfig(**arguments),
        train_dataset=Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(8)] * 4}),
        processing_class=tokenizer,
    )


def bonus(level: float = 0.8) -> EntropySchedule:
    return EntropySchedule(Constant(level), PID(kp=0.5, ki=0.1), "entropy_bonus")


def test_entropy_bonus_is_steered_and_logged(tmp_path) -> None:
    trainer = trainer_for(tmp_path)
    schedule = bonus().attach(trainer)
    trainer.train()
    assert [reading.step for reading in schedule.readings] == [0, 1, 2, 3]
    assert trainer.entropy_coef == schedule.control.setting < 0  # H starts above its target
    logged = [log for log in trainer.state.log_history if "entropy_target" in log]
    assert len(logged) == 4
    for log, reading in zip(logged, schedule.readings, strict=True):
        assert log["entropy_target"] == pytest.approx(reading.target)
        assert log["entropy"] == pytest.approx(reading.entropy, rel=1e-4)


def test_clip_is_steered(tmp_path) -> None:
    trainer = trainer_for(tmp_path, save_strategy="no")
    schedule = EntropySchedule(Constant(1.5), PID(kp=1.0)).attach(trainer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    assert trainer.epsilon_high == schedule.control.setting > 0.28


def test_control_resumes_with_trls_checkpoint(tmp_path) -> None:
    trainer = trainer_for(tmp_path)
    whole = bonus().attach(trainer)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / STATE).is_file()
    again = trainer_for(tmp_path)
    resumed = bonus().attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [reading.step for reading in resumed.readings] == [2, 3]
    assert resumed.control.initial_entropy == whole.control.initial_entropy
    (tmp_path / "checkpoint-2" / STATE).unlink()
    last = trainer_for(tmp_path)
    bonus().attach(last)
    with pytest.raises(SaltireError, match="was not written with this schedule"):
        last.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_strictly_on_policy_clip_is_warned_of(tmp_path) -> None:
    with pytest.warns(UserWarning, match="on-policy"):
        EntropySchedule(Constant(1.0)).attach(trainer_for(tmp_path, num_iterations=1))


def test_what_cannot_work_is_refused(tmp_path) -> None:
    with pytest.raises(SaltireError, match="clip_high, entropy_bonus"):
        EntropySchedule(Constant(1.0), actuator="sign_weight")
    with pytest.raises(SaltireError, match="expected a GRPOTrainer"):
        bonus().attach(object())
    trainer = trainer_for(tmp_path)
    schedule = bonus().attach(trainer)
    with pytest.raises(SaltireError, match="attached already"):
        schedule.attach(trainer)
    trainer.use_adaptive_entropy = True
    with pytest.raises(SaltireError, match="adaptive"):
        bonus().attach(trainer)
