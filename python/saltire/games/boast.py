"""Boast: the smallest game of bluff in words, with a known solution.

Each of two players holds one of three beasts, both stake a coin, and player 0 either passes or
boasts. It is Kuhn's poker in other words: boast = bet, yield = fold, doubt = call, so its value for
player 0 is -1/18 coins and its equilibria are known in closed form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import permutations
from random import Random
from typing import ClassVar

from saltire.games.game import Game, IllegalMove, Payoff, lost_by_forfeit
from saltire.games.reply import one_line

BEASTS = ("ant", "fox", "bear")  # weakest first

# Coins are halved, so that the largest win is 1 as in the other games and a forfeit (-1.5) is worse
# than the largest loss.
COIN = 0.5

_WORD = re.compile(r"\[(pass|boast|doubt|yield)\]", re.IGNORECASE)


@dataclass(frozen=True)
class Deal:
    """beasts: one index into BEASTS per player; said: the moves so far; talk: the words sent."""

    beasts: tuple[int, int]
    said: tuple[str, ...] = ()
    talk: tuple[str, ...] = ()
    result: Payoff | None = None


@dataclass(frozen=True)
class Boast(Game[Deal, tuple[str, str]]):
    """Three beasts, one coin staked, one more on a boast; the stronger beast wins what is doubted.

    talk: let players say things before their move; the solver needs it off.
    """

    name: ClassVar[str] = "boast"
    outcomes: ClassVar[tuple[str, ...]] = ("player 0", "player 1")
    enumerable: ClassVar[bool] = True

    talk: bool = False

    def reset(self, seed: int, players: int | None = None) -> Deal:
        self.check_players(players)
        first, second = Random(seed).sample(range(len(BEASTS)), 2)
        return Deal((first, second))

    def deals(self) -> list[tuple[float, Deal]]:
        """Every first state with its probability."""
        deals = list(permutations(range(len(BEASTS)), 2))
        return [(1 / len(deals), Deal(beasts)) for beasts in deals]

    def turn(self, state: Deal) -> int:
        return len(state.said) % 2

    def observe(self, state: Deal, player: int) -> str:
        said = "\n".join(
            f"Player {i % 2}: {f'{words} ' if words else ''}[{move}]"
            for i, (move, words) in enumerate(zip(state.said, state.talk, strict=True))
        )
        moves = " or ".join(self.legal(state)) if state.result is None else ""
        return (
            f"You are player {player} in Boast. The beasts are ant < fox < bear; both players have "
            "staked one coin.\n"
            f"Your beast is the {BEASTS[state.beasts[player]]}.\n"
            + (f"{said}\n" if said else "")
            + (f"Your move is {moves}.\n" if moves else "")
        )

    def legal(self, state: Deal) -> tuple[str, ...]:
        boasted = bool(state.said) and state.said[-1] == "boast"
        return ("[yield]", "[doubt]") if boasted else ("[pass]", "[boast]")

    def parse_action(self, state: Deal, text: str) -> tuple[str, str]:
        match = _WORD.search(text)
        if match is None or match[0].lower() not in self.legal(state):
            raise IllegalMove(f"a move holds {' or '.join(self.legal(state))}")
        return match[1].lower(), one_line(text[: match.start()]) if self.talk else ""

    def step(self, state: Deal, move: tuple[str, str]) -> Deal:
        player, (word, words) = self.turn(state), move
        state = replace(state, said=(*state.said, word), talk=(*state.talk, words))
        stronger = int(state.beasts[1] > state.beasts[0])
        if word == "yield":
            return replace(state, result=_won(1 - player, 1, f"Player {player} yields."))
        shown = f"{BEASTS[state.beasts[0]]} against {BEASTS[state.beasts[1]]}."
        if word == "doubt":
            return replace(state, result=_won(stronger, 2, f"Doubted: {shown}"))
        if state.said == ("pass", "pass"):
            return replace(state, result=_won(stronger, 1, f"Both pass: {shown}"))
        return state

    def forfeit(self, state: Deal, reason: str) -> Deal:
        return replace(state, result=lost_by_forfeit(self.turn(state), reason))

    def payoff(self, state: Deal) -> Payoff | None:
        return state.result


def _won(player: int, coins: int, reason: str) -> Payoff:
    rewards = tuple(COIN * (coins if p == player else -coins) for p in (0, 1))
    return Payoff(rewards, f"player {player}", reason)
