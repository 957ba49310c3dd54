"""DEPT: self-play that gets stuck, and advantages that notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from saltire.report.impasse import plot_toys
from saltire.rl.impasse_toys import TOYS, estimator, run_toy

KINDS = {"dept": "DEPT", "rae": "average per role"}
SEEDS, STEPS = range(3), 2000


def run(folder: Path, console: Console) -> dict[str, Any]:
    """Play both toys with both kinds of advantage from the same starts, and draw them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors of 64 numbers: a second thread only waits
    try:
        runs = {
            (toy.name, kind): [run_toy(toy, estimator(kind), seed, STEPS) for seed in SEEDS]
            for toy in TOYS
            for kind in KINDS
        }
    finally:
        torch.set_num_threads(threads)
    table = Table(title="seeds that leave the impasse", title_justify="left")
    for column in ("toy", *KINDS.values()):
        table.add_column(column)
    for toy in TOYS:
        left = (sum(r.left() for r in runs[toy.name, kind]) for kind in KINDS)
        table.add_row(toy.name, *(f"{count} of {len(SEEDS)}" for count in left))
    console.print(table)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "impasse.png"
    plot_toys({KINDS[kind]: runs[TOYS[0].name, kind] for kind in KINDS}, picture)
    console.print(f"share of the stuck outcome over time: {picture}", highlight=False)
    left_of = {f"{toy}/{kind}": [r.left() for r in many] for (toy, kind), many in runs.items()}
    return {"left": left_of, "picture": str(picture)}
