"""Entropy schedules on a small transformer: is the target tracked, and which schedule wins Pass@k?

A Llama of 0.2 M weights over characters is made here, taught countdown from solutions until it
solves part of it, then trained by DAPO under each schedule, from the same warm start, with the
same prompts and the same uniform numbers. Each seed is a model, a warm start and a run of its own.

Keys of the last line: tracking_error (<= 0.1; |H - H*| / H* in the stable phase of
stable_then_anneal after the first fifth, mean over seeds) and, for each arm, Pass@1 and Pass@K
with the half-width of their 95 % t-interval, and the paired differences to stable_then_anneal.
``--quick`` is the same with 5 seeds and shorter runs (at most 6 minutes on two cores).
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LARGEST_K = 32
# Targets are multiples of the entropy after the warm start.
ARMS: dict[str, dict[str, Any] | None] = {
    "no_control": None,
    "constant": {"kind": "constant", "level": 1.0},
    "high_constant": {"kind": "constant", "level": 1.4},
    "stable_then_anneal": {"kind": "stable_then_anneal", "stable": 1.0, "end": 0.2},
}
T_975 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def config(arm: str, seed: int, steps: int, out: Path, actuator: str) -> Any:
    from saltire.rl.config import TrainConfig
    from saltire.settings import build

    gains = {
        "entropy_bonus": {"kind": "pid", "kp": 0.3, "ki": 0.05, "slew": 0.05},
        "clip_high": {"kind": "pid", "kp": 5.0, "ki": 0.5, "slew": 0.5},
    }[actuator]
    bounds = {"low": -0.3, "high": 0.3} if actuator == "entropy_bonus" else {}
    return build(
        TrainConfig,
        {
            "output": str(out),
            "seed": seed,
            "steps": steps,
            "task": {
                "kind": "countdown", "rows": 4000, "held_out": 128, "numbers": 3, "terse": True,
                "seed": seed,
            },
            "rollout": {"prompts": 16, "samples": 8, "max_new_tokens": 10, "batch": 1024},
            "update": {
                "learning_rate": 1e-4, "minibatches": 4, "micro_batch": 64, "algorithm": "dapo",
            },
            "entropy": {
                "schedule": ARMS[arm],
                "controller": gains,
                "actuator": {"name": actuator, **bounds},
            },
            "evaluation": {
                "every": 0, "prompts": 64, "samples": 64, "ks": [1, 4, 16, LARGEST_K],
            },
            "checkpoint": {"every": 0},
        },
    )  # fmt: skip


def warm_start(seed: int, steps: int, folder: Path) -> None:
    """Teach a fresh model from solutions and save it."""
    import torch

    from saltire.rl.scratch import taught_model
    from saltire.rl.tasks import countdown

    torch.set_num_threads(1)
    task, _ = countdown(4000, 3, 9, seed=seed, terse=True).split(128)
    model, _ = taught_model(task, steps=steps, seed=seed)
    model.save_pretrained(folder)


def train(job: tuple[str, int, int, int, str, str]) -> dict[str, Any]:
    """One arm of one seed; returns its last record and its entropies."""
    arm, seed, steps, warm_steps, root, actuator = job
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from saltire.rl.scratch import character_tokenizer
    from saltire.rl.setup import make_trainer

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    folder = Path(root) / f"warm-{seed}"
    if not folder.exists():
        warm_start(seed, warm_steps, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = Path(root) / arm / f"seed-{seed}"
    trainer = make_trainer(config(arm, seed, steps, out, actuator), model, character_tokenizer())
    before = trainer.evaluate() if arm == "no_control" else {}
    records = trainer.run()
    return {
        "arm": arm,
        "seed": seed,
        "before": before,
        "after": {name: value for name, value in records[-1].items() if name.startswith("pass@")},
        "entropy": [record["entropy"] for record in records],
        "target": [record.get("target") for record in records],
        "phase": [record.get("phase") for record in records],
        "actuator": [record.get("actuator") for record in records],
        "verdict": trainer.authority.verdict if trainer.authority else None,
    }


def tracking_error(result: dict[str, Any]) -> float:
    """Mean of |H - H*| / H* over the stable phase, its first fifth left out as settling."""
    stable = [i for i, phase in enumerate(result["phase"]) if phase == "stable"]
    settled = stable[len(stable) // 5 :]
    return statistics.mean(
        abs(result["entropy"][i] - result["target"][i]) / result["target"][i] for i in settled
    )


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and the half-width of its 95 % t-interval."""
    n = len(values)
    if n < 2:
        return values[0], float("nan")
    return statistics.mean(values), T_975[min(n - 1, 9)] * statistics.stdev(values) / n**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="5 seeds, short runs")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--warm-steps", type=int, default=500)
    parser.add_argument("--actuator", choices=["entropy_bonus", "clip_high"],
                        default="entropy_bonus")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--keep", help="keep the runs in this folder, for saltire plot")
    options = parser.parse_args()
    seeds = options.seeds or (5 if options.quick else 8)
    steps = options.steps or (100 if options.quick else 150)
    start = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or temporary
        first = [
            (arm, seed, steps, options.warm_steps, root, options.actuator)
            for arm in ("no_control",)
            for seed in range(seeds)
        ]
        others = [(arm, *job[1:]) for arm in ARMS if arm != "no_control" for job in first]
        with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
            results = list(pool.imap(train, first))  # these make the warm starts
            results += list(pool.imap(train, others))
    report(results, options, seeds, steps, time.perf_counter() - start)


def report(
    results: list[dict[str, Any]],
    options: argparse.Namespace,
    seeds: int,
    steps: int,
    seconds: float,
) -> None:
    """Print the table and the last line; append the rows to the CSV."""
    of = {arm: sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"])
          for arm in ARMS}  # fmt: skip
    keys: dict[str, Any] = {}
    rows = []
    ks = [1, 4, 16, LARGEST_K]
    before = [statistics.mean(r["before"][f"pass@{k}"] for r in of["no_control"]) for k in ks]
    print(
        f"{'warm start':20}"
        + "".join(f"  pass@{k} {v:.3f}       " for k, v in zip(ks, before, strict=True))
    )
    for arm, runs in of.items():
        line = f"{arm:20}"
        for k in ks:
            mean, half = interval([r["after"][f"pass@{k}"] for r in runs])
            line += f"  pass@{k} {mean:.3f} ±{half:.3f}"
            rows.append({"arm": arm, "measure": f"pass@{k}", "mean": mean, "half_width": half})
            if k in (1, LARGEST_K):
                keys[f"{arm}_pass{k}"] = [round(mean, 4), round(half, 4)]
        final = statistics.mean(r["entropy"][-1] for r in runs)
        print(f"{line}  entropy {runs[0]['entropy'][0]:.3f} -> {final:.3f}")
    winner = of["stable_then_anneal"]
    for arm in ("no_control", "constant", "high_constant"):
        for k in (1, LARGEST_K):
            pairs = zip(winner, of[arm], strict=True)
            differences = [a["after"][f"pass@{k}"] - b["after"][f"pass@{k}"] for a, b in pairs]
            mean, half = interval(differences)
            keys[f"anneal_minus_{arm}_pass{k}"] = [round(mean, 4), round(half, 4)]
    errors = {arm: interval([tracking_error(r) for r in of[arm]])
              for arm in ARMS if ARMS[arm] is not None}  # fmt: skip
    for arm, (mean, half) in errors.items():
        rows.append({"arm": arm, "measure": "tracking_error", "mean": mean, "half_width": half})
        print(f"tracking error, {arm}: {mean:.3f} ±{half:.3f}")
    keys["tracking_error"] = round(errors["stable_then_anneal"][0], 4)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True,
                         text=True, check=False)  # fmt: skip
    stamp = {"commit": git.stdout.strip(), "actuator": options.actuator, "seeds": seeds,
             "steps": steps, "quick": options.quick}  # fmt: skip
    path = HERE / "results" / "entropy_schedule.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*stamp, *rows[0]])
        if new:
            writer.writeheader()
        writer.writerows({**stamp, **row} for row in rows)
    print(json.dumps({**keys, **stamp, "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
