"""Agents: whatever answers when a match asks, in batches where it can.

An agent takes questions with ``ask`` and gives answers back with ``advance``, so that one agent
serves many matches at once and a language model writes all its answers in one batch.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from saltire.errors import SaltireError


@dataclass(frozen=True)
class Ask:
    """One question of a match.

    turn: replies that the match has had; it and ``attempt`` name the question within the match.
    observation: all that the player may know. legal: texts that would be accepted. seed: the
    match's, for an agent's own random numbers. refused: why the last attempt was no legal move.
    """

    match: int
    player: int
    turn: int
    observation: str
    legal: tuple[str, ...]
    seed: int
    attempt: int = 0
    refused: str = ""

    def random(self) -> Random:
        """A generator of this question's own: the same whenever and wherever it is asked."""
        return Random(f"{self.seed}/{self.player}/{self.turn}/{self.attempt}")


@dataclass(frozen=True)
class Reply:
    """The answer to ``ask``; or, where the agent failed at this one question, why."""

    ask: Ask
    text: str
    error: str = ""


class Agent(ABC):
    """name: in transcripts and logs. retries: how often a reply that is no legal move is refused
    with a reason and asked for again, before it counts."""

    name: str
    retries: int = 0

    @abstractmethod
    def ask(self, ask: Ask) -> None:
        """Take a question. Raises SaltireError if it can never be answered."""

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether questions wait for an answer."""

    @abstractmethod
    def advance(self) -> list[Reply]:
        """Work for a while; answers that are ready, in any order."""

    def over(self, match: int) -> None:
        """The match has ended: questions of it need no answer, memory of it may go."""
        return


class ScriptedAgent(Agent):
    """Answers each question by itself, with a function of the question."""

    def __init__(self, name: str, reply: Callable[[Ask], str], retries: int = 0) -> None:
        self.name, self.retries, self._reply = name, retries, reply
        self._waiting: list[Ask] = []

    def ask(self, ask: Ask) -> None:
        self._waiting.append(ask)

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def advance(self) -> list[Reply]:
        asks, self._waiting = self._waiting, []
        return [self._answer(ask) for ask in asks]

    def over(self, match: int) -> None:
        self._waiting = [ask for ask in self._waiting if ask.match != match]

    def _answer(self, ask: Ask) -> Reply:
        try:
            return Reply(ask, self._reply(ask))
        except Exception as error:  # one match's trouble is not another's
            return Reply(ask, "", f"{type(error).__name__}: {error}")


def random_reply(ask: Ask) -> str:
    """One of the legal texts that the game lists."""
    return ask.random().choice(_some(ask))


def first_reply(ask: Ask) -> str:
    """The first of them."""
    return _some(ask)[0]


def last_reply(ask: Ask) -> str:
    """The last of them: in most games the one that ends the talking."""
    return _some(ask)[-1]


def no_reply(ask: Ask) -> str:
    """Nothing at all."""
    return ""


def _some(ask: Ask) -> Sequence[str]:
    if not ask.legal:
        raise SaltireError("the game lists no legal moves; play it with a model or a person.")
    return ask.legal


SCRIPTED: dict[str, Callable[[Ask], str]] = {
    "random": random_reply,
    "first": first_reply,
    "last": last_reply,
    "silent": no_reply,
}


def scripted(name: str) -> ScriptedAgent:
    """The scripted agent of that name. Raises SaltireError with the nearest names."""
    if name not in SCRIPTED:
        raise SaltireError(unknown_agent(name))
    return ScriptedAgent(name, SCRIPTED[name])


def unknown_agent(name: str) -> str:
    """What to say of an agent that does not exist."""
    known = [*SCRIPTED, "human", "default"]
    near = difflib.get_close_matches(name.lower(), known, n=2, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return (
        f"no agent is called {name!r}. {hint}Agents are {', '.join(SCRIPTED)}, human, and models: "
        "default, a directory, a .gguf file or a hub name."
    )
