"""What is kept of a match: enough to read it, to rate its agents, and to play it again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saltire.errors import SaltireError
from saltire.files import replacing_file
from saltire.games.game import Game, IllegalMove
from saltire.games.reply import split_reply

FORMAT = 1
MAX_FILE_BYTES = 1 << 31


@dataclass(frozen=True)
class TurnRecord:
    """A reply as it was given. refused: why it was no legal move. final: whether it was then
    counted as a forfeit; otherwise the player was asked again."""

    player: int
    text: str
    refused: str = ""
    final: bool = False


@dataclass(frozen=True)
class MatchRecord:
    """A match from its seed to its end.

    agents, roles, rewards: one per player. outcome: empty for a match that crashed, and then
    ``error`` says why.
    """

    number: int
    game: str
    options: dict[str, Any]
    seed: int
    agents: tuple[str, ...]
    roles: tuple[str, ...]
    turns: tuple[TurnRecord, ...]
    outcome: str = ""
    rewards: tuple[float, ...] = ()
    reason: str = ""
    forfeits: tuple[int, ...] = ()
    error: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a line of a match log."""
        return {"format": FORMAT, **asdict(self)}


def read_record(values: Any, where: str) -> MatchRecord:
    """A record from a log's line. Raises SaltireError, naming ``where``, if it is not one."""
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"it is of format {values['format']}, not {FORMAT}")
        turns = tuple(
            TurnRecord(int(t["player"]), str(t["text"]), str(t["refused"]), bool(t["final"]))
            for t in values["turns"]
        )
        return MatchRecord(
            number=int(values["number"]),
            game=str(values["game"]),
            options=dict(values["options"]),
            seed=int(values["seed"]),
            agents=tuple(map(str, values["agents"])),
            roles=tuple(map(str, values["roles"])),
            turns=turns,
            outcome=str(values["outcome"]),
            rewards=tuple(map(float, values["rewards"])),
            reason=str(values["reason"]),
            forfeits=tuple(map(int, values["forfeits"])),
            error=str(values["error"]),
            notes=dict(values["notes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SaltireError(f"{where} is not the record of a match: {error!r}.") from None


def write_records(path: Path, records: Iterable[MatchRecord]) -> None:
    """Write a match log, one JSON object a line, in place of what was there."""
    with replacing_file(path) as temporary:
        temporary.write_text("".join(line(record) for record in records), encoding="utf-8")


def line(record: MatchRecord) -> str:
    """A record as a line of a log."""
    return json.dumps(record.to_dict()) + "\n"


def read_records(path: Path) -> list[MatchRecord]:
    """The matches of a log. A last line that a kill cut off is left out; other damage is named."""
    if not path.is_file():
        raise SaltireError(f"there is no match log {path}.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise SaltireError(f"{path} is above {MAX_FILE_BYTES >> 30} GiB; split it.")
    records = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            if number == len(lines):  # no newline after it: the write was cut off
                break
            raise SaltireError(f"{path}, line {number} is not JSON.") from None
        records.append(read_record(values, f"{path}, line {number}"))
    return records


def replay(game: Game[Any, Any], record: MatchRecord) -> None:
    """Play a record's replies again. Raises SaltireError where the game does not agree with it."""
    state = game.reset(record.seed, len(record.agents))
    for number, turn in enumerate(record.turns):
        where = f"match {record.number}, reply {number}"
        if game.payoff(state) is not None:
            raise SaltireError(f"{where}: the match is over before it.")
        if game.turn(state) != turn.player:
            raise SaltireError(
                f"{where}: player {turn.player} replies; it is player {game.turn(state)}'s turn."
            )
        try:
            move = game.parse_action(state, split_reply(turn.text)[1])
        except IllegalMove as illegal:
            if not turn.refused:
                raise SaltireError(f"{where} is no legal move here: {illegal}.") from None
            if turn.final:
                state = game.forfeit(state, str(illegal))
            continue
        if turn.refused:
            raise SaltireError(f"{where} was refused ({turn.refused}); here it is legal.")
        state = game.step(state, move)
    payoff = game.payoff(state)
    if record.error:
        return
    found = (payoff.outcome, payoff.rewards) if payoff else ("no end", ())
    if found != (record.outcome, record.rewards):
        raise SaltireError(
            f"match {record.number} ended with {record.outcome} {record.rewards}; played again "
            f"it ends with {found[0]} {found[1]}."
        )
