"""``saltire train``: RL on a verifiable task, with entropy on a schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
import yaml

from saltire.cli import _console
from saltire.cli._selfplay import train_selfplay
from saltire.errors import SaltireError


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("train")(train)


def train(
    settings: Path = typer.Argument(
        ..., help="A YAML file; docs/es.md and docs/dept.md list the settings."
    ),
    change: list[str] = typer.Option(
        [], "--set", help="Change one setting: --set update.learning_rate=1e-5."
    ),
    resume: bool = typer.Option(False, "--resume", help="Go on from the last checkpoint."),
    as_json: bool = _console.JSON_OPTION,
) -> None:
    """Train a language model by reinforcement learning; entropy follows a schedule.

    With ``kind: selfplay`` in the file it plays a game against itself.

    Under torchrun the weights are sharded over the ranks (FSDP2).
    """
    from saltire.rl.config import TrainConfig
    from saltire.rl.distributed import rank, start_if_launched
    from saltire.rl.export import export_model
    from saltire.rl.setup import make_trainer
    from saltire.settings import build, read_yaml

    values = read_yaml(settings)
    for text in change:
        apply_change(values, text)
    if values.pop("kind", "task") == "selfplay":
        train_selfplay(values, resume, as_json)
        return
    config = build(TrainConfig, values)
    start_if_launched()
    trainer = make_trainer(config)
    records = trainer.run(resume)
    model = export_model(config, trainer.parts)
    if rank():
        return
    for message in trainer.messages:
        _console.err.print(f"[yellow]note:[/] {message}", highlight=False, soft_wrap=True)
    last = records[-1] if records else {}
    if as_json:
        _console.print_json({"output": config.output, "model": str(model), "last": last})
        return
    shown = ("step", "entropy", "target", "actuator", "reward", "length", "seconds")
    numbers = {name: last[name] for name in shown if last.get(name) is not None}
    numbers |= {name: value for name, value in last.items() if name.startswith("pass@")}
    rows = [[name, f"{value:.4g}"] for name, value in numbers.items()]
    if rows:
        _console.out.print(_console.table("last step", ["", "value"], rows))
    _console.out.print(f"the model is in {model}; draw the run with: saltire plot {config.output}")


def apply_change(values: dict[str, Any], text: str) -> None:
    """Apply ``a.b=value`` to nested mappings; the value is read as YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise SaltireError(f"--set {text}: expected name=value, such as update.epochs=2.")
    *parents, name = path.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise SaltireError(f"--set {text}: {parent} has no settings within.")
    try:
        values[name] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise SaltireError(f"--set {text}: {json.dumps(value)} is not a YAML value.") from None
