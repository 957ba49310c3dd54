"""``saltire play GAME --agents a,b`` and ``saltire tournament GAME --agents a,b,c``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from saltire.cli import _console
from saltire.errors import SaltireError

if TYPE_CHECKING:
    from saltire.games import Agent, Fixture, Game, MatchRecord, TurnRecord

AGENTS_HELP = (
    "one a seat, with commas: random, first, last, silent, human, or a model (default, a "
    "directory, a .gguf, a hub name)"
)
OPTION = typer.Option([], "--set", help="an option of the game: --set turns=6")
ENGINE = typer.Option("auto", help="for models: decoder (ours), transformers, or auto")
TOKENS = typer.Option(160, help="tokens of a reply at most")
TEMPERATURE = typer.Option(0.8, help="of models; 0 is greedy")
THINK = typer.Option(True, help="ask models for a thought before the move; small ones fail at it")
OUT = typer.Option(None, "--out", help="write the matches as JSON lines, to be played again")
IN_FLIGHT = typer.Option(32, help="matches played at the same time")


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command("play")(play)
    app.command("tournament")(tournament)


def play(
    game: str = typer.Argument("", help="dont-say-it, two-dollar, …, or textarena:ID"),
    agents: str = typer.Option("random", help=AGENTS_HELP),
    matches: int = typer.Option(1, help="how many; one is shown as it is played"),
    seed: int = typer.Option(0, help="of the first deal, and of the agents"),
    option: list[str] = OPTION,
    max_new_tokens: int = TOKENS,
    temperature: float = TEMPERATURE,
    think: bool = THINK,
    engine: str = ENGINE,
    in_flight: int = IN_FLIGHT,
    out: Path | None = OUT,
    replay: Path | None = typer.Option(None, help="show and check the matches of a log instead"),
    match: int = typer.Option(-1, help="with --replay: this match alone, by its number"),
    step: int = typer.Option(-1, help="with --replay of a training run: its matches of this step"),
    json: bool = _console.JSON_OPTION,
) -> None:
    """Let agents play a game, and show the match."""
    from saltire.games import Fixture, make, write_records

    if replay is not None:
        _replay(replay, match, step, json)
        return
    if not game:
        raise SaltireError("name a game, such as dont-say-it, or give --replay LOG.")
    if matches < 1:
        raise SaltireError(f"matches = {matches}; expected at least 1.")
    chosen = make(game, **_options(option))
    names = _seats(chosen, agents)
    playing = _open(names, max_new_tokens, temperature, think, engine, seed, in_flight)
    # Even matches have the seats as they were given, odd ones are the same deal turned round.
    fixtures = [
        Fixture(n, seed + n // 2, names if n % 2 == 0 else names[1:] + names[:1])
        for n in range(matches)
    ]
    live = matches == 1 and not json
    records = _played(chosen, playing, fixtures, in_flight, live)
    if out is not None:
        write_records(out, records)
    if json:
        _console.print_json({"matches": [record.to_dict() for record in records]})
    elif not live:
        from saltire.report.transcript import outcome_table

        _console.out.print(outcome_table(records))
        for record in [record for record in records if record.error][:3]:
            _console.err.print(f"match {record.number} crashed: {record.error}", highlight=False)
    if all(record.error for record in records):
        raise SaltireError(f"every match crashed; the first: {records[0].error}")


def tournament(
    game: str = typer.Argument(..., help="dont-say-it, two-dollar, …, or textarena:ID"),
    agents: str = typer.Option(..., help=AGENTS_HELP),
    deals: int = typer.Option(20, help="deals; every pair plays each from both sides"),
    players: int = typer.Option(0, help="seats of a match, in games for more than two"),
    seed: int = typer.Option(0, help="of the first deal, and of the agents"),
    option: list[str] = OPTION,
    level: float = typer.Option(0.9, help="of the intervals, in (0, 1)"),
    max_new_tokens: int = TOKENS,
    temperature: float = TEMPERATURE,
    think: bool = THINK,
    engine: str = ENGINE,
    in_flight: int = IN_FLIGHT,
    out: Path | None = OUT,
    json: bool = _console.JSON_OPTION,
) -> None:
    """Let every pair of agents meet, and rate them: win rates and Bradley-Terry strengths."""
    from saltire.games import make, rate, round_robin, write_records

    if not 0 < level < 1:
        raise SaltireError(f"level = {level}; expected a share in (0, 1), such as 0.9.")
    chosen = make(game, **_options(option))
    names = tuple(name.strip() for name in agents.split(",") if name.strip())
    if "human" in names:
        raise SaltireError("human plays in saltire play, not in a tournament.")
    fixtures = round_robin(names, deals, seed, chosen.check_players(players or None))
    playing = _open(names, max_new_tokens, temperature, think, engine, seed, in_flight)
    records = _played(chosen, playing, fixtures, in_flight, live=False)
    if out is not None:
        write_records(out, records)
    ratings = rate(records, level)
    crashed = [record for record in records if record.error]
    if json:
        _console.print_json(
            {
                "game": chosen.name,
                "matches": len(records) - len(crashed),
                "crashed": len(crashed),
                "ratings": [asdict(rating) for rating in ratings],
            }
        )
        return
    from saltire.report.transcript import outcome_table, rating_table

    _console.out.print(outcome_table(records))
    _console.out.print(rating_table(ratings, level))
    for record in crashed[:3]:
        _console.err.print(f"match {record.number} crashed: {record.error}", highlight=False)


def _seats(game: Game[Any, Any], text: str) -> tuple[str, ...]:
    """An agent a seat; one alone plays every seat, with the fewest players."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise SaltireError("--agents names nobody; give one agent a seat, such as random,human.")
    if len(names) == 1:
        return names * game.min_players
    game.check_players(len(names))
    return names


def _options(texts: list[str]) -> dict[str, Any]:
    from saltire.settings import read_option

    return dict(read_option(text) for text in texts)


def _open(
    names: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    think: bool,
    engine: str,
    seed: int,
    in_flight: int,
) -> dict[str, Agent]:
    from saltire.rl.selfplay import Voice, open_agents

    if engine not in ("auto", "decoder", "transformers"):
        raise SaltireError(f"engine = {engine!r}; expected auto, decoder or transformers.")
    voice = Voice(max_new_tokens, temperature, think, seed)
    sequences = max(2, 2 * in_flight)
    return open_agents(list(names), voice, _human, engine, sequences)  # type: ignore[arg-type]


def _human() -> Agent:
    from saltire.rl.selfplay.agents import Human

    def show(ask: Any) -> None:
        _console.err.rule("your turn")
        _console.err.print(ask.observation, markup=False, highlight=False)
        if ask.refused:
            _console.err.print(f"that was no legal move: {ask.refused}", style="red", markup=False)
        _console.err.print("your move: ", end="")

    def read() -> str:
        line = sys.stdin.readline()
        if not line:
            raise KeyboardInterrupt  # the end of the input is the end of the game
        return line.rstrip("\n")

    return Human(show, read)


def _played(
    game: Game[Any, Any],
    agents: dict[str, Agent],
    fixtures: Sequence[Fixture],
    in_flight: int,
    live: bool,
) -> list[MatchRecord]:
    """Play all; with ``live``, print the one match turn by turn."""
    from saltire.games import play as play_matches
    from saltire.progress import track
    from saltire.report import transcript

    watch = None
    if live:
        seats = fixtures[0].agents
        transcript.print_opening(_console.out, game, fixtures[0])

        def watch(_: int, turns: Sequence[TurnRecord]) -> None:
            transcript.print_turn(_console.out, turns[-1], seats)

    ended = play_matches(game, agents, fixtures, in_flight, watch)
    records = sorted(track(ended, "matches", len(fixtures)), key=lambda record: record.number)
    if live:
        transcript.print_end(_console.out, records[0])
    return records


def _replay(log: Path, match: int, step: int, json: bool) -> None:
    from saltire.games import make, read_records, replay
    from saltire.report.transcript import outcome_table, print_match

    records = read_records(log)
    chosen = [
        record
        for record in records
        if match in (-1, record.number) and step in (-1, record.notes.get("step"))
    ]
    if not chosen:
        asked = f"match {match}" if match >= 0 else "match"
        of = f" of step {step}" if step >= 0 else ""
        raise SaltireError(f"{log} holds no {asked}{of}; it holds {len(records)} matches.")
    if match >= 0:
        chosen = chosen[-1:]  # a training run numbers its matches anew in each step
    for record in chosen:
        game = make(record.game, **record.options)
        replay(game, record)
        if not json and (match >= 0 or len(chosen) <= 3):
            print_match(_console.out, record, game)
    if json:
        _console.print_json({"replayed": len(chosen), "matches": [r.to_dict() for r in chosen]})
        return
    if len(chosen) > 1:
        _console.out.print(outcome_table(chosen))
    _console.out.print(f"{len(chosen)} played again, with the same end.", style="dim")
