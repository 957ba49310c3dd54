"""Social language games as pure rules, matches of many agents, and how they are rated."""

from saltire.games.catalogue import GAMES, make
from saltire.games.game import FORMAT_PENALTY, Game, IllegalMove, Payoff
from saltire.games.reply import THINK_THEN_ACT, split_reply

__all__ = [
    "FORMAT_PENALTY",
    "GAMES",
    "THINK_THEN_ACT",
    "Game",
    "IllegalMove",
    "Payoff",
    "make",
    "split_reply",
]
