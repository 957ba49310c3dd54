"""A match as people read it: who knew what, what was said, how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from saltire.games.game import Game, IllegalMove
from saltire.games.matches import Fixture
from saltire.games.ratings import Rating
from saltire.games.records import MatchRecord, TurnRecord
from saltire.games.reply import one_line, split_reply

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta")
LONGEST_SHOWN = 600  # characters of one thought or one refused reply


def print_match(console: Console, record: MatchRecord, game: Game[Any, Any]) -> None:
    """The whole match, with what each player knew at the start."""
    print_opening(console, game, Fixture(record.number, record.seed, record.agents))
    for turn in record.turns:
        print_turn(console, turn, record.agents)
    print_end(console, record)


def print_opening(console: Console, game: Game[Any, Any], fixture: Fixture) -> None:
    """The game, its seats, and each player's first view of it."""
    console.rule(f"[bold]{escape(game.name)}[/]  match {fixture.number}, seed {fixture.seed}")
    state = game.reset(fixture.seed, len(fixture.agents))
    for player, agent in enumerate(fixture.agents):
        role = game.role(state, player)
        title = f"player {player}: {agent}" + ("" if role == f"player {player}" else f" ({role})")
        knows = Text(game.observe(state, player).strip(), style="dim")
        console.print(Panel(knows, title=escape(title), title_align="left", style=_colour(player)))


def print_turn(console: Console, turn: TurnRecord, agents: Sequence[str]) -> None:
    """One reply: the thought dimmed, the move plain, a refusal in red."""
    name = Text(f"player {turn.player} ", style=f"bold {_colour(turn.player)}")
    name.append(f"({agents[turn.player]})", style="dim")
    if turn.refused:
        name.append("  forfeits" if turn.final else "  is asked again", style="bold red")
        console.print(name)
        _indented(console, shortened(turn.text) or "(nothing)", "red")
        _indented(console, f"no legal move: {turn.refused}", "dim red")
        return
    console.print(name)
    try:
        thought, move = split_reply(turn.text)
    except IllegalMove:  # a log that was changed by hand
        thought, move = "", turn.text
    if thought:
        _indented(console, f"thinks: {shortened(thought)}", "dim italic")
    _indented(console, one_line(move), "")


def print_end(console: Console, record: MatchRecord) -> None:
    """How it ended, and what each player got."""
    if record.error:
        console.print(Text(f"The match crashed: {record.error}", style="bold red"))
        return
    console.print()
    console.print(Text(f"{record.outcome}: {record.reason}", style="bold"))
    for player, reward in enumerate(record.rewards):
        line = Text(f"  player {player} ", style=_colour(player))
        line.append(f"({record.agents[player]})", style="dim")
        line.append(f"  {reward:+.1f}", style="default")
        if player in record.forfeits:
            line.append("  forfeit", style="red")
        console.print(line)


def outcome_table(records: Sequence[MatchRecord]) -> Table:
    """How often each outcome came, and what each agent got in each seat."""
    done = [record for record in records if not record.error]
    table = Table(title=f"{len(done)} matches", title_justify="left")
    for column in ("outcome", "matches", "share"):
        table.add_column(column, justify="left" if column == "outcome" else "right")
    for outcome in sorted({record.outcome for record in done}):
        count = sum(record.outcome == outcome for record in done)
        table.add_row(outcome, str(count), f"{count / len(done):.0%}")
    forfeits = sum(bool(record.forfeits) for record in done)
    if forfeits:
        table.add_row("with a forfeit", str(forfeits), f"{forfeits / len(done):.0%}", style="dim")
    crashed = len(records) - len(done)
    if crashed:
        table.add_row("crashed", str(crashed), "", style="red")
    return table


def rating_table(ratings: Sequence[Rating], level: float) -> Table:
    """A row an agent, best first."""
    table = Table(title=f"ratings, with {level:.0%} intervals", title_justify="left")
    columns = ("agent", "won-drawn-lost", "forfeits", "win rate", "", "Elo", "")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0)
    for r in ratings:
        low, high = r.win_rate_interval
        elo_low, elo_high = r.elo_interval
        table.add_row(
            escape(r.agent),
            f"{r.wins}-{r.draws}-{r.losses}",
            str(r.forfeits),
            f"{r.win_rate:.0%}",
            f"{low:.0%}–{high:.0%}",
            f"{r.elo:+.0f}",
            f"{elo_low:+.0f}…{elo_high:+.0f}",
        )
    return table


def shortened(text: str) -> str:
    """On one line, and not endless."""
    line = one_line(text)
    return line if len(line) <= LONGEST_SHOWN else f"{line[:LONGEST_SHOWN]} …"


def _indented(console: Console, text: str, style: str) -> None:
    console.print(Padding(Text(text, style=style), (0, 0, 0, 4)))


def _colour(player: int) -> str:
    return COLOURS[player % len(COLOURS)]
