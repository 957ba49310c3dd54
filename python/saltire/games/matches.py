"""Playing matches: many in flight at once, each on its own, sharing what their agents compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saltire.errors import SaltireError
from saltire.games.agents import Agent, Ask, Reply
from saltire.games.game import Game, IllegalMove
from saltire.games.records import MatchRecord, TurnRecord
from saltire.games.reply import split_reply

# Every game of ours ends far below it; it stops a game whose rules never do.
MOST_REPLIES = 2000


@dataclass(frozen=True)
class Fixture:
    """A match to be played: its number, the seed of its deal, and an agent's name per player."""

    number: int
    seed: int
    agents: tuple[str, ...]


# Called after every reply with the match as it stands: its number, its replies so far.
Watch = Callable[[int, Sequence[TurnRecord]], None]


@dataclass
class _Live:
    fixture: Fixture
    state: Any
    roles: tuple[str, ...]
    turns: list[TurnRecord] = field(default_factory=list)
    attempt: int = 0
    refused: str = ""
    waits_for: str = ""


class _Crash(Exception):  # noqa: N818 - it ends one match, not the program
    pass


def play(
    game: Game[Any, Any],
    agents: Mapping[str, Agent],
    fixtures: Iterable[Fixture],
    in_flight: int = 32,
    watch: Watch | None = None,
    most_replies: int = MOST_REPLIES,
) -> Iterator[MatchRecord]:
    """Play ``fixtures``, up to ``in_flight`` of them at a time; records as matches end.

    A reply that is no legal move is a forfeit, once the agent's retries are used up. Whatever an
    agent or the game raises in one match ends that match with ``error`` set, and the others go on.
    Raises SaltireError for a fixture that names no agent or seats a wrong number of players.
    """
    if in_flight < 1:
        raise SaltireError(f"in_flight = {in_flight}; expected at least 1 match.")
    todo = deque(fixtures)
    for fixture in todo:
        game.check_players(len(fixture.agents))
        missing = set(fixture.agents) - set(agents)
        if missing:
            raise SaltireError(
                f"match {fixture.number} seats {missing.pop()!r}, which is no agent."
            )
    hall = _Hall(game, agents, watch, most_replies)
    while todo or hall.live:
        while todo and len(hall.live) < in_flight:
            hall.open(todo.popleft())
        hall.advance()
        yield from hall.take_ended()


class _Hall:
    """The matches in flight."""

    def __init__(
        self,
        game: Game[Any, Any],
        agents: Mapping[str, Agent],
        watch: Watch | None,
        most_replies: int,
    ) -> None:
        self.game, self.agents, self.watch = game, agents, watch
        self.most_replies = most_replies
        self.live: dict[int, _Live] = {}
        self._ended: list[MatchRecord] = []

    def open(self, fixture: Fixture) -> None:
        live = _Live(fixture, None, ("",) * len(fixture.agents))
        if fixture.number in self.live:
            raise SaltireError(f"two matches have the number {fixture.number}.")
        self.live[fixture.number] = live
        with _guarded(self, live):
            live.state = self.game.reset(fixture.seed, len(fixture.agents))
            live.roles = tuple(
                self.game.role(live.state, player) for player in range(len(fixture.agents))
            )
            self._ask(live)

    def advance(self) -> None:
        for name, agent in self.agents.items():
            if not agent.busy:
                continue
            try:
                replies = agent.advance()
            except Exception as error:  # all that wait for this agent are lost, nobody else is
                for live in [one for one in self.live.values() if one.waits_for == name]:
                    self._end(live, error=f"agent {name}: {_said(error)}")
                continue
            for reply in replies:
                live_now = self.live.get(reply.ask.match)
                if live_now is not None:
                    with _guarded(self, live_now):
                        self._take(live_now, reply)

    def take_ended(self) -> list[MatchRecord]:
        ended, self._ended = self._ended, []
        return ended

    def _ask(self, live: _Live) -> None:
        """Ask whoever is to move, or end the match."""
        game, state = self.game, live.state
        if game.payoff(state) is not None:
            self._end(live)
            return
        if len(live.turns) >= self.most_replies:
            raise _Crash(f"the match had no end after {self.most_replies} replies")
        player = game.turn(state)
        name = live.fixture.agents[player]
        ask = Ask(
            live.fixture.number,
            player,
            len(live.turns),
            game.observe(state, player),
            game.legal(state),
            live.fixture.seed,
            live.attempt,
            live.refused,
        )
        live.waits_for = name
        self.agents[name].ask(ask)

    def _take(self, live: _Live, reply: Reply) -> None:
        if reply.error:
            raise _Crash(f"agent {live.waits_for}: {reply.error}")
        game, player = self.game, reply.ask.player
        try:
            move = game.parse_action(live.state, split_reply(reply.text)[1])
        except IllegalMove as illegal:
            live.refused = str(illegal)
            final = live.attempt >= self.agents[live.waits_for].retries
            self._note(live, TurnRecord(player, reply.text, live.refused, final))
            live.attempt += 1
            if final:
                live.state = game.forfeit(live.state, live.refused)
                live.attempt, live.refused = 0, ""
        else:
            live.state = game.step(live.state, move)
            live.attempt, live.refused = 0, ""
            self._note(live, TurnRecord(player, reply.text))
        self._ask(live)

    def _note(self, live: _Live, turn: TurnRecord) -> None:
        live.turns.append(turn)
        if self.watch is not None:
            self.watch(live.fixture.number, live.turns)

    def _end(self, live: _Live, error: str = "") -> None:
        fixture = self.live.pop(live.fixture.number).fixture
        for name in set(fixture.agents):
            self.agents[name].over(fixture.number)
        payoff = None if error else self.game.payoff(live.state)
        self._ended.append(
            MatchRecord(
                number=fixture.number,
                game=self.game.name,
                options=self.game.options(),
                seed=fixture.seed,
                agents=fixture.agents,
                roles=live.roles,
                turns=tuple(live.turns),
                outcome=payoff.outcome if payoff else "",
                rewards=payoff.rewards if payoff else (),
                reason=payoff.reason if payoff else "",
                forfeits=payoff.forfeits if payoff else (),
                error=error,
            )
        )


class _guarded:  # noqa: N801 - reads as a word in ``with``
    """Turns whatever is raised within into the end of one match."""

    def __init__(self, hall: _Hall, live: _Live) -> None:
        self.hall, self.live = hall, live

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        if self.live.fixture.number in self.hall.live:
            self.hall._end(self.live, error=_said(error))
        return True


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (_Crash, SaltireError)) else f"{type(error).__name__}: {text}"
