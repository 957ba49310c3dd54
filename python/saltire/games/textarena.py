"""TextArena's environments as games, and our agents as its agents (extra ``games``).

    game = make("textarena:SimpleNegotiation-v0")
    agent = textarena_agent(scripted("first"))       # for TextArena's own loops

An environment is mutable and draws from Python's global random generator. A state here is the seed
and the replies so far: the environment is moved along while states are used in order, and played
again from its seed for any other; the global generators are its own while it runs, and as they were
before once it has run.
"""

from __future__ import annotations

import contextlib
import difflib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from saltire.errors import MissingExtraError, SaltireError
from saltire.games.agents import Agent, Ask
from saltire.games.game import FORMAT_PENALTY, Game, IllegalMove, Payoff
from saltire.games.reply import split_reply

PREFIX = "textarena:"
COUNTS = (2, 1, 3, 4, 5, 6, 7, 8)  # players that are tried, in this order
NLTK_FOLDERS = ("corpora", "taggers", "tokenizers")


@dataclass(frozen=True)
class Sitting:
    """replies: all so far. table: an environment that has had at least these replies."""

    seed: int
    players: int
    replies: tuple[str, ...]
    table: _Table = field(compare=False, repr=False)
    given_up: Payoff | None = None


@dataclass(frozen=True)
class TextArenaGame(Game[Sitting, str]):
    """An environment of TextArena by its id.

    players: 0 takes the first count that the environment accepts, two if it can. settings: passed
    to the environment. Rewards are TextArena's; but a player whom it ends for an invalid move gets
    FORMAT_PENALTY, and in a match of two the other then gets 0, as in our own games. TextArena asks
    again after a first invalid move, and so do we.
    """

    id: str
    players: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_id(self.id)
        count = self.players or self._fewest()
        labels = tuple(f"player {p}" for p in range(count))
        many = (*labels, "several", "draw")
        ends = {1: ("won", "not won"), 2: (*labels, "draw")}.get(count, many)
        for name, value in (
            ("name", f"{PREFIX}{self.id}"),
            ("players", count),
            ("roles", labels),
            ("outcomes", ends),
            ("min_players", count),
            ("max_players", count),
        ):
            object.__setattr__(self, name, value)

    def options(self) -> dict[str, Any]:
        return {"players": self.players, **self.settings}

    def reset(self, seed: int, players: int | None = None) -> Sitting:
        count = self.check_players(players)
        return Sitting(seed, count, (), _Table(self.id, self.settings, seed, count))

    def turn(self, state: Sitting) -> int:
        return self._table(state).player

    def observe(self, state: Sitting, player: int) -> str:
        return self._table(state).observation(player)

    def legal(self, state: Sitting) -> tuple[str, ...]:
        """Nothing: TextArena does not list moves."""
        return ()

    def parse_action(self, state: Sitting, text: str) -> str:
        if not text.strip():
            raise IllegalMove("the reply holds no move")
        return text

    def step(self, state: Sitting, move: str) -> Sitting:
        table = self._table(state)
        table.reply(move)
        return replace(state, replies=(*state.replies, move), table=table)

    def forfeit(self, state: Sitting, reason: str) -> Sitting:
        player = self.turn(state)
        rewards = tuple(FORMAT_PENALTY if p == player else 0.0 for p in range(state.players))
        outcome = {1: "not won", 2: f"player {1 - player}"}.get(state.players, "several")
        why = f"Player {player} forfeits: {reason}"
        return replace(state, given_up=Payoff(rewards, outcome, why, (player,)))

    def payoff(self, state: Sitting) -> Payoff | None:
        return state.given_up or self._table(state).payoff()

    def _table(self, state: Sitting) -> _Table:
        if state.table.replies == len(state.replies):
            return state.table
        table = _Table(self.id, self.settings, state.seed, state.players)
        for reply in state.replies:
            table.reply(reply)
        return table

    def _fewest(self) -> int:
        refusals = []
        for count in COUNTS:
            refusal = self._refusal(count)
            if not refusal:
                return count
            refusals.append(refusal)
        raise SaltireError(f"{PREFIX}{self.id}: no number of players was accepted: {refusals[0]}")

    def _refusal(self, count: int) -> str:
        """Why the environment cannot be played by ``count``; empty if it can."""
        try:
            _Table(self.id, self.settings, 0, count)
        except _WrongCountError as error:
            return str(error)
        return ""


class _WrongCountError(SaltireError):
    """The environment refused to be reset."""


class _Table:
    """One environment in play, with random generators of its own."""

    def __init__(self, id: str, settings: Mapping[str, Any], seed: int, players: int) -> None:
        ta = _package()
        self.id, self.players, self.replies, self.done = id, players, 0, False
        # The environment seeds Python's generator itself; it may draw before that, and from NumPy.
        own = random.Random(seed)
        self._random: Any = own.getstate()
        self._numpy: Any = np.random.RandomState(seed % (1 << 32)).get_state()
        with self._inside(), _no_downloads(id):
            try:
                self.env = ta.make(id, **settings)
            except SaltireError:
                raise
            except Exception as error:
                raise SaltireError(f"{PREFIX}{id} cannot be made: {_line(error)}") from error
        with self._inside(), _no_downloads(id):
            try:
                self.env.reset(num_players=players, seed=seed)
            except SaltireError:
                raise
            except Exception as error:
                raise _WrongCountError(
                    f"{PREFIX}{id} cannot be played by {players}: {_line(error)}"
                ) from error
        self._look()

    def reply(self, text: str) -> None:
        with self._inside():
            self.done = bool(self.env.step(action=text)[0])
        self.replies += 1
        if not self.done:
            self._look()

    def observation(self, player: int) -> str:
        """What the player to move sees; for another, the messages that wait for it."""
        if player == self.player and not self.done:
            return self.seen
        return _text(self.env.state.observations.get(player, []))

    def payoff(self) -> Payoff | None:
        if not self.done:
            return None
        raw, info = self.env.close()
        if not isinstance(raw, dict) or set(raw) != set(range(self.players)):
            raise SaltireError(f"{PREFIX}{self.id} ended with the rewards {raw!r}.")
        rewards = [float(raw[p]) for p in range(self.players)]
        forfeits = tuple(p for p in range(self.players) if info[p].get("invalid_move"))
        reason = str(info[0].get("reason") or "")
        outcome = self._label(rewards)
        if forfeits:
            if self.players == 2:
                rewards = [0.0, 0.0]
            for player in forfeits:
                rewards[player] = FORMAT_PENALTY
        return Payoff(tuple(rewards), outcome, reason, forfeits)

    def _label(self, rewards: list[float]) -> str:
        if self.players == 1:
            return "won" if rewards[0] >= 1 else "not won"
        best = [p for p, reward in enumerate(rewards) if reward == max(rewards)]
        if len(best) == 1:
            return f"player {best[0]}"
        return "draw" if len(best) == self.players else "several"

    def _look(self) -> None:
        with self._inside():
            player, seen = self.env.get_observation()
        self.player, self.seen = int(player), _text(seen)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Give the environment its own random numbers, and everybody else theirs back."""
        outside = random.getstate(), np.random.get_state()
        random.setstate(self._random)
        np.random.set_state(self._numpy)
        try:
            yield
        finally:
            self._random, self._numpy = random.getstate(), np.random.get_state()
            random.setstate(outside[0])
            np.random.set_state(outside[1])


def textarena_agent(agent: Agent, seed: int = 0) -> Any:
    """Our agent as one of TextArena's: called with an observation, it returns its move.

    A thought is left out; a reply without a move is passed on as it is, for TextArena to judge.
    Raises SaltireError if the agent fails.
    """
    base: Any = _package().Agent

    class OurAgent(base):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def __call__(self, observation: str) -> str:
            self.calls += 1
            agent.ask(Ask(0, 0, self.calls, observation, (), seed))
            while agent.busy:
                for reply in agent.advance():
                    if reply.error:
                        raise SaltireError(f"agent {agent.name}: {reply.error}")
                    try:
                        return split_reply(reply.text)[1]
                    except IllegalMove:
                        return reply.text
            raise SaltireError(f"agent {agent.name} gave no reply.")

    return OurAgent()


def environments() -> list[str]:
    """The ids of all environments."""
    registry = _package().envs.registration.ENV_REGISTRY
    return sorted(registry)


def _package() -> Any:
    try:
        import textarena
    except ImportError as error:
        raise MissingExtraError("textarena", "games", "a game of TextArena") from error
    return textarena


def _check_id(id: str) -> None:
    known = environments()
    if id not in known:
        near = difflib.get_close_matches(id, known, n=3, cutoff=0.4)
        hint = f"Did you mean {', '.join(PREFIX + name for name in near)}? " if near else ""
        raise SaltireError(f"TextArena has no environment {id!r}. {hint}It has {len(known)}.")


@contextlib.contextmanager
def _no_downloads(id: str) -> Iterator[None]:
    """Some environments fetch word lists when they are loaded; nothing is fetched here.

    Within, nltk.download does nothing where the data is there, and says how to get it where it is
    not.
    """
    try:
        import nltk
    except ImportError:  # TextArena needs it; without it there is nothing to hold back
        yield
        return

    def refuse(wanted: Any, *_: Any, **__: Any) -> bool:
        names = [wanted] if isinstance(wanted, str) else list(wanted or [])
        missing = [name for name in names if not _has_data(nltk, name)]
        if missing:
            raise SaltireError(
                f"{PREFIX}{id} needs NLTK's {', '.join(missing)}, which it would download; saltire "
                f"downloads nothing. Get them with: python -m nltk.downloader {' '.join(missing)}"
                + (" - or play our own dont-say-it." if "DontSayIt" in id else "")
            )
        return True

    kept, nltk.download = nltk.download, refuse
    try:
        yield
    finally:
        nltk.download = kept


def _has_data(nltk: Any, name: str) -> bool:
    for folder in NLTK_FOLDERS:
        for path in (f"{folder}/{name}", f"{folder}/{name}.zip"):
            with contextlib.suppress(LookupError):
                nltk.data.find(path)
                return True
    return False


def _text(seen: Any) -> str:
    """An observation as text: wrapped environments give one, raw ones a list of messages."""
    if isinstance(seen, str):
        return seen.strip()
    names = {-1: "GAME"}
    return "\n".join(f"[{names.get(who, f'Player {who}')}] {said}" for who, said, *_ in seen)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
