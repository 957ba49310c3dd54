"""``saltire demo``: every stage of the demo, on the default model."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from saltire.cli import _console
from saltire.errors import SaltireError


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    folder: Path = typer.Option(Path("saltire-demo"), help="where checkpoints and pictures go"),
    only: str = typer.Option("", help="run one stage, by name"),
    json: bool = _console.JSON_OPTION,
) -> None:
    """Show what saltire does, on the default model, with figures measured on this machine."""
    from saltire.demo import STAGES

    chosen = [stage for stage in STAGES if only in ("", stage.name)]
    if not chosen:
        names = ", ".join(stage.name for stage in STAGES)
        raise SaltireError(f"there is no stage {only!r}. Stages: {names}.")
    console = _console.err if json else _console.out
    facts = {}
    for number, stage in enumerate(chosen, 1):
        start = time.perf_counter()
        console.rule(f"{number}/{len(chosen)}  {stage.title}")
        facts[stage.name] = stage.run(folder, console)
        facts[stage.name]["seconds"] = time.perf_counter() - start
        console.print(f"took {facts[stage.name]['seconds']:.0f} s", style="dim")
    if json:
        _console.print_json(facts)
