"""``saltire train``: RL on a verifiable task, with entropy on a schedule."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
import yaml
from rich.console import Console

from saltire.cli import _console
from saltire.cli._selfplay import train_selfplay
from saltire.errors import SaltireError

if TYPE_CHECKING:
    from saltire.rl.config import TrainConfig
    from saltire.rl.trainer import Trainer


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
    lines = StepLines(_console.err if as_json else _console.out, config.steps)
    if rank() == 0:
        lines.print(summary(config, trainer))
    records = trainer.run(resume, lines if rank() == 0 else ignore)
    model = export_model(config, trainer.parts)
    if rank():
        return
    for message in trainer.messages:
        _console.note(message)
    memory = peak_memory_mb()
    if as_json:
        last = records[-1] if records else {}
        _console.print_json(
            {"output": config.output, "model": str(model), "memory_mb": memory, "last": last}
        )
        return
    _console.out.print(
        f"{len(records)} steps; {memory / 1024:.1f} GiB of memory at most. The model is in "
        f"{model}; draw the run with: saltire plot {config.output}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def summary(config: TrainConfig, trainer: Trainer) -> str:
    """What is trained on what, in two lines."""
    from saltire.rl.decoder_rollout import DecoderRollout

    weights = list(trainer.parts.policy.parameters())
    trained = sum(p.numel() for p in weights if p.requires_grad)
    engine = "our decoder" if isinstance(trainer.parts.rollout, DecoderRollout) else "transformers"
    control = trainer.parts.control
    entropy = "entropy is measured and left alone"
    if control is not None and config.entropy.schedule is not None:
        entropy = f"entropy: {config.entropy.schedule['kind']} by {control.actuator.name}"
    update = config.update
    return (
        f"{config.model}: {sum(p.numel() for p in weights) / 1e6:.1f} M weights, "
        f"{trained / 1e6:.1f} M trained; {len(trainer.parts.train.rows)} prompts of "
        f"{trainer.parts.train.name}, {len(trainer.parts.held_out.rows)} held out\n"
        f"{update.algorithm}, {update.updates_per_rollout} updates for each rollout of "
        f"{config.rollout.prompts} x {config.rollout.samples} completions by {engine}; {entropy}"
    )


class StepLines:
    """A line for a step, at most one a second; evaluations and the last step are always shown."""

    COLUMNS = (
        ("entropy", "entropy", "8.3f"),
        ("target", "target", "8.3f"),
        ("actuator", "actuator", "9.3f"),
        ("reward", "reward", "7.3f"),
        ("length", "length", "7.1f"),
        ("seconds", "seconds", "8.1f"),
    )

    def __init__(self, console: Console, steps: int) -> None:
        self.console, self.steps = console, steps
        self.last, self.headed = 0.0, False

    def __call__(self, record: dict[str, Any]) -> None:
        """Show the record of a step, perhaps."""
        passes = [f"{name} {v:.3f}" for name, v in record.items() if name.startswith("pass@")]
        step, now = record["step"] + 1, time.monotonic()
        if now - self.last < 1 and not passes and step < self.steps:
            return
        self.last = now
        shown = [column for column in self.COLUMNS if record.get(column[0]) is not None]
        if not self.headed:
            self.headed = True
            titles = (f"{title:>{int(form.split('.')[0])}}" for _, title, form in shown)
            self.print(f"{'step':>{len(str(self.steps)) * 2 + 1}}" + "".join(titles))
        place = f"{step:>{len(str(self.steps))}}/{self.steps}"
        values = "".join(f"{record[name]:{form}}" for name, _, form in shown)
        self.print(f"{place}{values}  {'  '.join(passes)}")

    def print(self, line: str) -> None:
        """Print plain text; a terminal wraps it, nothing else does."""
        self.console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)


def ignore(record: dict[str, Any]) -> None:
    """What every rank but the first shows."""


def peak_memory_mb() -> float:
    """The most memory that this process has held, in MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


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
