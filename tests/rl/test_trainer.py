"""The trainer: what a step does, and that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from saltire.errors import SaltireError
from saltire.rl import checkpoint
from saltire.rl.config import TrainConfig
from saltire.rl.export import export_model
from saltire.rl.lora import LoraLinear
from saltire.rl.runlog import RunLog, read_log
from saltire.rl.scratch import character_tokenizer, small_model
from saltire.rl.setup import make_trainer
from saltire.rl.trainer import Trainer
from saltire.settings import build


def settings(output: Path, **changes) -> dict:
    values = {
        "output": str(output),
        "steps": 4,
        "task": {"kind": "arithmetic", "rows": 40, "held_out": 8, "digits": 1},
        "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": 4},
        "update": {"learning_rate": 1e-3, "micro_batch": 16},
        "entropy": {
            "schedule": {"kind": "stable_then_anneal", "stable": 0.9, "end": 0.5},
            "controller": {"kind": "pid", "kp": 0.05, "ki": 0.01},
            "actuator": {"name": "entropy_bonus"},
        },
        "curriculum": {"order": "easy_first"},
        "evaluation": {"every": 2, "prompts": 4, "samples": 4, "ks": [1, 4]},
        "checkpoint": {"every": 2},
    }
    for name, value in changes.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return values


def trainer_for(output: Path, seed: int = 0, **changes) -> Trainer:
    tokenizer = character_tokenizer()
    model = small_model(len(tokenizer), hidden=32, heads=2, layers=2, seed=seed)
    return make_trainer(build(TrainConfig, settings(output, **changes)), model, tokenizer)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.parts.policy.parameters()])


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": {"rank": 2}, "update": {"kl_coefficient": 0.1}},
        {"rollout": {"resample": 2}, "entropy": {"actuator": {"name": "temperature"}}},
        {
            "update": {"kl_coefficient": 0.1, "bf16": True, "algorithm": "grpo"},
            "rollout": {"engine": "transformers"},
        },
    ],
    ids=["full", "lora-kl", "resample-temperature", "kl-bf16"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, changes) -> None:
    whole = trainer_for(tmp_path / "whole", **changes)
    whole.run()
    first = trainer_for(tmp_path / "cut", **changes)
    for step in range(3):  # killed after step 2, with a checkpoint of step 2 and a log of step 3
        first.step(step)
        if step == 1:
            first.save(2)
    # Trained weights come from the checkpoint, whatever the model in hand; frozen ones (below LoRA,
    # or the reference of a KL term) are no part of it: they are the model's.
    frozen = "lora" in changes or "kl_coefficient" in changes.get("update", {})
    second = trainer_for(tmp_path / "cut", seed=0 if frozen else 9, **changes)
    records = second.run(resume=True)
    assert torch.equal(weights(second), weights(whole))
    expected = read_log(tmp_path / "whole" / "log.jsonl")
    assert without_times(records) == without_times(expected)[2:]


def test_a_step_logs_what_it_did(tmp_path) -> None:
    records = trainer_for(tmp_path / "run").run()
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert all(0 <= r["entropy"] <= math.log(24) for r in records)
    assert [("pass@4" in r) for r in records] == [False, True, False, True]
    for record in records:
        assert record["error"] == pytest.approx(record["target"] - record["entropy"])
    logged = read_log(tmp_path / "run" / "log.jsonl")
    assert logged == json.loads(json.dumps(records))


def test_an_output_that_holds_a_run_is_not_overwritten(tmp_path) -> None:
    trainer_for(tmp_path / "run", steps=1).run()
    with pytest.raises(SaltireError, match="--resume"):
        trainer_for(tmp_path / "run", steps=1).run()


def test_resuming_with_other_settings_is_refused(tmp_path) -> None:
    trainer_for(tmp_path / "run").run()
    with pytest.raises(SaltireError, match="update"):
        trainer_for(tmp_path / "run", update={"learning_rate": 1e-4}).run(resume=True)


def test_a_kill_while_a_checkpoint_is_written_costs_no_checkpoint(tmp_path, monkeypatch) -> None:
    trainer = trainer_for(tmp_path / "run")
    trainer.run()
    folder = tmp_path / "run" / "checkpoints"
    before = checkpoint.latest(folder)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saltire.rl.checkpoint.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.save(9)
    (folder / ".00000009.abcd.tmp").mkdir()  # what a kill -9 would leave
    assert checkpoint.latest(folder) == before
    assert trainer_for(tmp_path / "run").resume() == 4


def test_only_the_last_checkpoints_are_kept(tmp_path) -> None:
    trainer_for(tmp_path / "run", checkpoint={"every": 1, "keep": 2}).run()
    assert checkpoint.all_steps(tmp_path / "run" / "checkpoints") == [3, 4]


@pytest.mark.parametrize("file", ["weights.safetensors", "optimiser.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(tmp_path, file) -> None:
    trainer_for(tmp_path / "run", steps=1).run()
    path = tmp_path / "run" / "checkpoints" / "00000001" / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SaltireError, match="damaged"):
        trainer_for(tmp_path / "run", steps=1).run(resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:
    trainer_for(tmp_path / "run").run()
    with pytest.raises(SaltireError, match="another model"):
        trainer_for(tmp_path / "run", lora={"rank": 2}).run(resume=True)


def test_probe_leaves_everything_as_it_was(tmp_path) -> None:
    probed = trainer_for(tmp_path / "a", steps=1)
    plain = trainer_for(tmp_path / "b", steps=1, entropy={"probe": False})
    first, second = probed.run(), plain.run()
    assert probed.authority is not None
    assert probed.authority.verdict == "positive"
    assert torch.equal(weights(probed), weights(plain))
    assert without_times(first) == without_times(second)


def test_on_policy_clip_is_reported_with_its_cure(tmp_path) -> None:
    trainer = trainer_for(
        tmp_path / "run",
        update={"minibatches": 1, "epochs": 1},
        entropy={"actuator": {"name": "clip_high"}, "controller": {"kind": "pid"}},
    )
    trainer.run()
    assert trainer.authority is not None
    assert trainer.authority.verdict == "none"
    assert "updates_per_rollout" in trainer.messages[0]


def test_equal_rewards_everywhere_leave_the_weights_alone(tmp_path) -> None:
    """Nothing to learn from is not an error: without a bonus, the policy stays as it is."""
    trainer = trainer_for(
        tmp_path / "run",
        task={"kind": "file", "path": str(unanswerable(tmp_path)), "held_out": 2},
        entropy={"schedule": None},
    )
    before = weights(trainer)
    records = trainer.run()
    assert torch.equal(weights(trainer), before)
    assert all(record["informative"] == 0 for record in records)


def unanswerable(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    row = {"question": "1+1=", "answer": "123456789"}  # nine digits do not fit in four tokens
    path.write_text("\n".join([json.dumps(row)] * 8))
    return path


def test_full_training_exports_a_model_that_loads(tmp_path) -> None:
    trainer = trainer_for(tmp_path / "run", steps=1)
    trainer.run()
    folder = export_model(trainer.config, trainer.parts)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        expected = trainer.parts.policy.model(tokens).logits
        assert torch.equal(model(tokens).logits, expected)


def test_lora_trains_and_exports_adapters_alone(tmp_path) -> None:
    trainer = trainer_for(tmp_path / "run", steps=2, lora={"rank": 2, "targets": ["q_proj"]})
    frozen = {
        name: p.detach().clone()
        for name, p in trainer.parts.policy.named_parameters()
        if "lora" not in name
    }
    trainer.run()
    for name, parameter in trainer.parts.policy.named_parameters():
        assert "lora" in name or torch.equal(parameter, frozen[name])
    folder = export_model(trainer.config, trainer.parts)
    adapters = load_file(folder / "adapter_model.safetensors")
    layers = [m for m in trainer.parts.policy.modules() if isinstance(m, LoraLinear)]
    assert len(adapters) == 2 * len(layers) == 4
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert adapters[key].abs().max() > 0
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (2, ["q_proj"])


def test_lora_without_a_matching_layer_is_refused(tmp_path) -> None:
    with pytest.raises(SaltireError, match="no such linear"):
        trainer_for(tmp_path / "run", lora={"targets": ["nothing"]})


def test_log_drops_a_line_cut_by_a_kill_and_names_other_damage(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert [record["step"] for record in read_log(path)] == [0, 1]
    log = RunLog(tmp_path, start=1)
    log.write({"step": 1, "loss": math.nan})
    log.close()
    assert read_log(path) == [{"step": 0}, {"step": 1, "loss": None}]
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(SaltireError, match="line 2"):
        read_log(path)


def test_prompts_that_ranks_cannot_share_are_refused(tmp_path, monkeypatch) -> None:
    trainer = trainer_for(tmp_path / "run")
    monkeypatch.setattr("saltire.processes.world_size", lambda: 3)
    with pytest.raises(SaltireError, match="multiple"):
        trainer.collector.collect(0, "stable", 1.0)


def test_kl_keeps_the_policy_near_its_start(tmp_path) -> None:
    """With the KL term alone and rewards that teach nothing, entropy control is the only force."""
    moved = []
    for coefficient in (0.0, 1.0):
        folder = tmp_path / str(coefficient)
        folder.mkdir()
        trainer = trainer_for(
            folder / "run",
            steps=3,
            task={"kind": "file", "path": str(unanswerable(folder)), "held_out": 2},
            entropy={"controller": {"kind": "open_loop", "setting": 0.1}},
            update={"kl_coefficient": coefficient, "epochs": 4, "learning_rate": 3e-3},
        )
        before = weights(trainer)
        trainer.run()
        moved.append(float((weights(trainer) - before).norm()))
    assert moved[1] < moved[0]
    shutil.rmtree(tmp_path)
