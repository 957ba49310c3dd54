"""ES: reinforcement learning in which entropy follows a schedule."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from saltire.demo.stage import Stage
from saltire.report.curves import arrange, draw_png, write_page
from saltire.report.runs import read_groups
from saltire.rl.config import TrainConfig
from saltire.rl.scratch import taught_model
from saltire.rl.setup import make_task, make_trainer
from saltire.settings import build

WARM_STEPS, STEPS = 400, 60


def settings(out: Path) -> TrainConfig:
    """Countdown with three numbers; entropy is held, then annealed to a third."""
    return build(
        TrainConfig,
        {
            "output": str(out),
            "steps": STEPS,
            "task": {"kind": "countdown", "rows": 2000, "held_out": 64, "terse": True},
            "rollout": {"prompts": 16, "samples": 8, "max_new_tokens": 10, "batch": 1024},
            "update": {"learning_rate": 3e-4, "minibatches": 4, "micro_batch": 64},
            "entropy": {
                "schedule": {"kind": "stable_then_anneal", "stable": 1.0, "end": 0.33},
                "controller": {"kind": "pid", "kp": 0.3, "ki": 0.05, "slew": 0.05},
                "actuator": {"name": "entropy_bonus", "low": -0.3, "high": 0.3},
            },
            "evaluation": {"every": 10, "prompts": 64, "samples": 16},
            "checkpoint": {"every": 0},
        },
    )


def run(folder: Path, console: Console) -> dict[str, Any]:
    """Make a model, teach it to solve some of it, train it on a schedule, and draw the run."""
    out = folder / "entropy-run"
    if out.exists():
        shutil.rmtree(out)  # a demo is run again from the start
    config = settings(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of a tiny model: a second thread only waits
    try:
        model, tokenizer = taught_model(make_task(config.task), steps=WARM_STEPS)
        trainer = make_trainer(config, model, tokenizer)
        before = trainer.evaluate()
        records = trainer.run()
    finally:
        torch.set_num_threads(threads)
    groups = read_groups([str(out)])
    pictures, picture = arrange(groups), folder / "entropy.png"
    draw_png(groups, pictures, picture)
    write_page(groups, pictures, "Entropy on a schedule", folder / "entropy.html")
    console.print(progress(before, records))
    found = trainer.authority
    error = tracking_error(records)
    if found is not None:
        console.print(
            f"probe: {found.gain:+.3f} nats for each unit of the bonus ({found.verdict}); target "
            f"missed by {error:.1%} in the stable phase",
            highlight=False,
        )
    console.print(f"entropy, target and actuator over the steps: {picture}", highlight=False)
    return {
        "tracking_error": error,
        "verdict": None if found is None else found.verdict,
        "before": before,
        "after": {name: records[-1][name] for name in before},
        "picture": str(picture),
    }


def tracking_error(records: list[dict[str, Any]]) -> float:
    """Mean of |H − H*| / H* over the stable phase, without its first fifth, which settles."""
    stable = [record for record in records if record["phase"] == "stable"]
    settled = stable[len(stable) // 5 :]
    return sum(abs(record["error"]) / record["target"] for record in settled) / len(settled)


def progress(before: dict[str, float], records: list[dict[str, Any]]) -> Table:
    """The run at a few of its steps."""
    table = Table(title="countdown, 0.1 million weights", title_justify="left")
    for column in ("step", "entropy", "target", "bonus", "reward", *before):
        table.add_column(column, justify="right")
    shown = [record for record in records if "pass@1" in record]
    for record in shown:
        values = [record[name] for name in ("entropy", "target", "actuator", "reward", *before)]
        table.add_row(str(record["step"] + 1), *(f"{value:.3f}" for value in values))
    return table


ENTROPY = Stage("entropy", "ES: training in which entropy follows a schedule", run)
