"""``saltire train`` where the settings say ``kind: selfplay``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saltire.cli import _console

SHOWN = ("step", "entropy", "target", "reward", "match_entropy", "forfeits", "win_rate", "seconds")


def train_selfplay(values: dict[str, Any], resume: bool, as_json: bool) -> None:
    """Train by the settings ``values`` and print the last step."""
    from saltire.rl.distributed import rank, start_if_launched
    from saltire.rl.export import write_policy
    from saltire.rl.selfplay.config import SelfPlayConfig
    from saltire.rl.selfplay.setup import make_selfplay
    from saltire.settings import build

    config = build(SelfPlayConfig, values)
    start_if_launched()
    trainer = make_selfplay(config)
    records = trainer.run(resume)
    parts, output = trainer.parts, Path(config.output)
    tokenizer = parts.learner.codec.tokenizer
    model = write_policy(parts.policy, tokenizer, config.lora, config.model, output)
    if rank():
        return
    for message in trainer.messages:
        _console.note(message)
    last = records[-1] if records else {}
    if as_json:
        _console.print_json({"output": config.output, "model": str(model), "last": last})
        return
    names = [*SHOWN, *(name for name in last if name.startswith("share ") or "lambda" in name)]
    rows = [[name, f"{last[name]:.4g}"] for name in names if last.get(name) is not None]
    if rows:
        _console.out.print(_console.table("last step", ["", "value"], rows))
    _console.out.print(
        f"the model is in {model}; draw the run with: saltire plot {output}; read a match of the "
        f"last step with: saltire play --replay {output / 'matches.jsonl'} --match 0",
        soft_wrap=True,
    )
