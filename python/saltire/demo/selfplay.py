"""DEPT: self-play that gets stuck and notices, and a match between two small models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from saltire.demo import impasse
from saltire.demo.stage import Stage
from saltire.games import Fixture, make, play, write_records
from saltire.report.transcript import print_end, print_opening, print_turn
from saltire.rl.selfplay import Voice, open_model

GAME, TURNS = "dont-say-it", 6
MODELS = {"calm": 0.3, "lively": 0.9}  # the default model at two temperatures


def run(folder: Path, console: Console) -> dict[str, Any]:
    """Show one match, then the toys that plain self-play gets stuck in."""
    game = make(GAME, turns=TURNS)
    voices = {name: Voice(40, heat, think=False, seed=1) for name, heat in MODELS.items()}
    agents = {name: open_model("default", voice, sequences=2) for name, voice in voices.items()}
    for name, agent in agents.items():
        agent.name = name
    fixture = Fixture(0, 7, tuple(MODELS))
    print_opening(console, game, fixture)
    records = list(
        play(
            game,
            agents,
            [fixture],
            watch=lambda _, turns: print_turn(console, turns[-1], fixture.agents),
        )
    )
    print_end(console, records[0])
    log = folder / "match.jsonl"
    write_records(log, records)
    console.print(f"read it again with: saltire play --replay {log}", highlight=False)
    facts = impasse.run(folder, console)
    return facts | {"match": records[0].to_dict(), "log": str(log)}


SELFPLAY = Stage("impasse", "DEPT: self-play that notices when it is stuck", run)
