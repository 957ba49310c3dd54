"""Don't Say It: make the other player say your word before you say theirs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from saltire.games.game import Game, Payoff, check_positive, draw, lost_by_forfeit, win
from saltire.games.reply import one_line
from saltire.games.words import hard_nouns, plain_nouns


@dataclass(frozen=True)
class Conversation:
    """words: each player's secret word; said: every message so far, player 0 first."""

    words: tuple[str, str]
    said: tuple[str, ...] = ()
    result: Payoff | None = None


@dataclass(frozen=True)
class DontSayIt(Game[Conversation, str]):
    """A conversation of at most ``turns`` messages; a draw if nobody says the other's word.

    turns: TextArena announces 20 and checks before it counts, so its matches have 21 messages; ours
    announces the true number. whole_words: False counts "start" as saying "art", as TextArena does.
    """

    name: ClassVar[str] = "dont-say-it"

    turns: int = 21
    whole_words: bool = False

    def __post_init__(self) -> None:
        check_positive(self.name, turns=self.turns)

    def reset(self, seed: int, players: int | None = None) -> Conversation:
        self.check_players(players)
        first, second = Random(seed).sample(self.vocabulary(), 2)
        return Conversation((first, second))

    def vocabulary(self) -> tuple[str, ...]:
        """The words that are dealt."""
        return plain_nouns()

    def turn(self, state: Conversation) -> int:
        return len(state.said) % 2

    def observe(self, state: Conversation, player: int) -> str:
        said = "\n".join(f"Player {i % 2}: {one_line(m)}" for i, m in enumerate(state.said))
        return (
            "Don't Say It is a conversation of two players, each with a secret word.\n"
            "You win when the other player says yours; you lose when you say theirs, which you do "
            "not know.\n"
            "Steer the talk so that your word comes up naturally. "
            "Your move is your next message, in any words.\n"
            f"After {self.turns} messages the match is drawn.\n"
            + (f"\n{said}\n" if said else "")
            + f"\nYou are player {player}. Your secret word is '{state.words[player]}'.\n"
            f"Messages so far: {len(state.said)} of {self.turns}.\n"
        )

    def legal(self, state: Conversation) -> tuple[str, ...]:
        return ("I see.", f"Do you like the {state.words[self.turn(state)]}?")

    def parse_action(self, state: Conversation, text: str) -> str:
        return text

    def step(self, state: Conversation, move: str) -> Conversation:
        player = self.turn(state)
        result = None
        if self._says(move, state.words[1 - player]):
            result = win(1 - player, f"Player {player} said '{state.words[1 - player]}'.")
        elif len(state.said) + 1 >= self.turns:
            result = draw(f"Nobody said the other's word in {self.turns} messages.")
        return replace(state, said=(*state.said, move), result=result)

    def forfeit(self, state: Conversation, reason: str) -> Conversation:
        return replace(state, result=lost_by_forfeit(self.turn(state), reason))

    def payoff(self, state: Conversation) -> Payoff | None:
        return state.result

    def _says(self, message: str, word: str) -> bool:
        if self.whole_words:
            return re.search(rf"\b{re.escape(word)}\b", message, re.IGNORECASE) is not None
        return word.lower() in message.lower()


@dataclass(frozen=True)
class DontSayItHard(DontSayIt):
    """The out-of-distribution variant: rarer words and a longer conversation."""

    name: ClassVar[str] = "dont-say-it-hard"

    turns: int = 31

    def vocabulary(self) -> tuple[str, ...]:
        return plain_nouns() + hard_nouns()
