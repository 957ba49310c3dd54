"""Training runs as curves: logs are read, runs that differ in their seed alone become one group."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saltire.errors import SaltireError
from saltire.rl.runlog import LOG, read_log

SETTINGS = "settings.json"
MAX_RUNS = 500  # a folder with more is not what was meant: a home directory, say


@dataclass(frozen=True)
class Run:
    """One log, with the settings of the run where it has left them."""

    folder: Path
    settings: dict[str, Any]
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    """A column over steps, at the steps that every seed has logged: mean, lowest and highest."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: int


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    name: str
    runs: tuple[Run, ...]

    def columns(self) -> list[str]:
        """The columns that hold numbers, in the order of the logs."""
        return list(
            dict.fromkeys(
                name
                for run in self.runs
                for record in run.records
                for name, value in record.items()
                if name != "step" and isinstance(value, (int, float))
            )
        )

    def curve(self, column: str) -> Curve | None:
        """The curve of a column; None where no step of it is common to all seeds."""
        seeds = [
            {
                record["step"]: float(record[column])
                for record in run.records
                if isinstance(record.get(column), (int, float))
            }
            for run in self.runs
        ]
        steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
        if not steps:
            return None
        values = [[seed[step] for seed in seeds] for step in steps]
        return Curve(
            steps,
            [math.fsum(each) / len(each) for each in values],
            [min(each) for each in values],
            [max(each) for each in values],
            len(seeds),
        )


def read_groups(arguments: Sequence[str]) -> list[Group]:
    """The runs in some folders, or below them, by group; ``NAME=FOLDER`` gives a group its name.

    Without one, a group is named after its run's folder, or after the folder that its seeds share.
    Raises SaltireError for a folder without a run, and for a log without a step.
    """
    members: dict[tuple[str, str], list[Run]] = {}
    for argument in arguments:
        name, _, folder = argument.rpartition("=")
        for run in _runs_below(Path(folder)):
            members.setdefault((name, _kind(run.settings)), []).append(run)
    groups = []
    for (name, _), runs in members.items():
        unique = {run.folder.resolve(): run for run in runs}
        groups.append((name or _common_name(list(unique)), tuple(unique.values())))
    names = [name for name, _ in groups]
    return [
        Group(name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})", runs)
        for i, (name, runs) in enumerate(groups)
    ]


def _runs_below(folder: Path) -> list[Run]:
    if not folder.is_dir():
        raise SaltireError(f"there is no folder {folder}; give the output of a training run.")
    logs = sorted(folder.rglob(LOG))
    if not logs:
        raise SaltireError(
            f"{folder} holds no run: there is no {LOG} in it or below. Give the output folder of "
            "saltire train."
        )
    if len(logs) > MAX_RUNS:
        raise SaltireError(f"{folder} holds {len(logs)} runs, above {MAX_RUNS}; give fewer.")
    return [_read(log) for log in logs]


def _read(log: Path) -> Run:
    records = read_log(log)
    if not records:
        raise SaltireError(f"{log} holds no step yet; wait for the first one.")
    path, settings = log.with_name(SETTINGS), {}
    if path.is_file():
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise SaltireError(
                f"{path} is not JSON ({error}); remove it to plot without."
            ) from None
    return Run(log.parent, settings if isinstance(settings, dict) else {}, records)


def _kind(settings: dict[str, Any]) -> str:
    """What two runs share when they differ in seed and place alone."""

    def without_seeds(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_seeds(v) for k, v in value.items() if k not in ("seed", "output")}
        return value

    return json.dumps(without_seeds(settings), sort_keys=True)


def _common_name(folders: Sequence[Path]) -> str:
    if len(folders) == 1:
        return folders[0].name
    shared = [parts[0] for parts in zip(*(f.parts for f in folders), strict=False)
              if len(set(parts)) == 1]  # fmt: skip
    return shared[-1] if shared else folders[0].name
