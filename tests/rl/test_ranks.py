"""Two ranks (FSDP2 over gloo) and one take the same decisions and learn the same weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from saltire.rl.runlog import read_log
from tests.rl.test_trainer import trainer_for

STEPS = 3
COMMON = {
    "steps": STEPS,
    "checkpoint": {"every": 0},
    "evaluation": {"every": 3, "prompts": 3},  # three prompts over two ranks: unequal parts
    # Adam's first steps move a weight by the learning rate however small its gradient is, so
    # roundings of the smallest gradients show; a small rate keeps them small.
    "update": {"micro_batch": 5, "learning_rate": 1e-4},
    "curriculum": {"order": "hard_first"},
}


def one_rank(rank: int, folder: str, changes: dict) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    trainer = trainer_for(Path(folder) / "two", **changes)
    records = trainer.run()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(records))
    dist.destroy_process_group()


def moments(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next((run / "checkpoints").iterdir()) / "optimiser.safetensors")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"lora": {"rank": 2, "alpha": 8.0}, "update": {**COMMON["update"], "kl_coefficient": 0.1}},
        {"update": {**COMMON["update"], "top_entropy": 0.3}},
    ],
    ids=["full", "lora-kl", "top-entropy"],
)
def test_two_ranks_decide_and_learn_as_one(tmp_path: Path, more: dict) -> None:
    changes = {**COMMON, **more}
    one = trainer_for(tmp_path / "one", **changes)
    one.run()
    # fork: a rank starts with everything imported
    mp.start_processes(one_rank, (str(tmp_path), changes), nprocs=2, start_method="fork")
    left, right = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    alone = read_log(tmp_path / "one" / "log.jsonl")
    assert len(left) == len(alone) == STEPS
    for a, b, c in zip(left, right, alone, strict=True):
        for name, value in c.items():
            if name == "seconds":
                continue
            assert a[name] == b[name], name  # bit for bit: no rank may go its own way
            if isinstance(value, float):
                assert a[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
            else:
                assert a[name] == value, name
    one, two = (moments(tmp_path / run) for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, moment in one.items():  # the running mean of gradients, where Adam's division is not
        assert (two[name] - moment).norm() <= 1e-2 * moment.norm(), name
