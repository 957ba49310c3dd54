"""What a game is: pure rules over immutable states, with every kind of input and output outside.

A game is a frozen dataclass of its options. ``reset`` deals from a seed, ``step`` maps a state and
a move to the next state, ``payoff`` is None until the match is over. No rule reads a clock or a
global random generator, so that a seed and the replies replay a match exactly.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from saltire.errors import SaltireError

State = TypeVar("State")
Move = TypeVar("Move")

# What a player loses by a reply that is no legal move: more than by losing, so that breaking the
# format is never a way out of a lost position (rewards as the DEPT paper gives them).
FORMAT_PENALTY = -1.5


class IllegalMove(Exception):  # noqa: N818 - an event of the game, not a fault of the program
    """A reply that is not a legal move; the message tells the player why."""


@dataclass(frozen=True)
class Payoff:
    """The end of a match.

    rewards: one per player, +1 win, 0 draw, -1 loss, FORMAT_PENALTY for a forfeit; outcome: one of
    the game's ``outcomes``; reason: a sentence for people; forfeits: players who forfeited.
    """

    rewards: tuple[float, ...]
    outcome: str
    reason: str
    forfeits: tuple[int, ...] = ()


class Game(ABC, Generic[State, Move]):
    """Rules of a game for ``min_players`` to ``max_players`` players who move one at a time.

    name: how people and logs call it; roles: every role that ``role`` can return; outcomes: every
    label that a match can end with, the K over which DEPT normalises its match entropy;
    enumerable: whether ``legal`` lists all the moves (otherwise a sample with one of every kind).
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]] = ("player 0", "player 1")
    outcomes: ClassVar[tuple[str, ...]] = ("player 0", "player 1", "draw")
    min_players: ClassVar[int] = 2
    max_players: ClassVar[int] = 2
    enumerable: ClassVar[bool] = False

    @abstractmethod
    def reset(self, seed: int, players: int | None = None) -> State:
        """The first state, dealt from ``seed``; players defaults to ``min_players``."""

    @abstractmethod
    def turn(self, state: State) -> int:
        """The player to move."""

    @abstractmethod
    def observe(self, state: State, player: int) -> str:
        """Everything that ``player`` may know: rules, own secrets, what has been said.

        What all players see alike comes first, rules and then what has been said; what only this
        one may know, and what changes from turn to turn, comes last: so a model's cache of the
        beginning holds, for the next turn and for the other players.
        """

    @abstractmethod
    def legal(self, state: State) -> tuple[str, ...]:
        """Texts that ``parse_action`` accepts now; all of them where the game is enumerable."""

    @abstractmethod
    def parse_action(self, state: State, text: str) -> Move:
        """The move that ``text`` means for the player to move. Raises IllegalMove."""

    @abstractmethod
    def step(self, state: State, move: Move) -> State:
        """The state after ``move``; ``state`` itself is untouched."""

    @abstractmethod
    def forfeit(self, state: State, reason: str) -> State:
        """The state after the player to move gave no legal reply. ``reason``: what was wrong."""

    @abstractmethod
    def payoff(self, state: State) -> Payoff | None:
        """How the match ended, or None while it goes on."""

    def role(self, state: State, player: int) -> str:
        """The role of ``player`` in this match, one of ``roles``."""
        return f"player {player}"

    def options(self) -> dict[str, Any]:
        """The options that, with the name, make this game again."""
        return dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}

    def check_players(self, players: int | None) -> int:
        """``players``, or ``min_players`` for None. Raises SaltireError outside the range."""
        count = self.min_players if players is None else players
        if not self.min_players <= count <= self.max_players:
            span = (
                f"{self.min_players}"
                if self.min_players == self.max_players
                else f"{self.min_players} to {self.max_players}"
            )
            raise SaltireError(f"{self.name} is for {span} players; {count} were given.")
        return count


def check_positive(game: str, **options: object) -> None:
    """Raises SaltireError for an option that is not a whole number of at least 1."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SaltireError(
                f"{game}: {name} must be a whole number of at least 1; it is {value!r}."
            )


def win(player: int, reason: str) -> Payoff:
    """``player`` won a match of two."""
    return Payoff(tuple(1.0 if p == player else -1.0 for p in (0, 1)), f"player {player}", reason)


def draw(reason: str) -> Payoff:
    """A match of two without a winner."""
    return Payoff((0.0, 0.0), "draw", reason)


def lost_by_forfeit(player: int, reason: str) -> Payoff:
    """``player`` forfeited a match of two.

    The label is the other's win, and the other's reward is 0: nothing it said earned more.
    """
    rewards = tuple(FORMAT_PENALTY if p == player else 0.0 for p in (0, 1))
    return Payoff(rewards, f"player {1 - player}", f"Player {player} forfeits: {reason}", (player,))
