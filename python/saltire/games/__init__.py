"""Social language games as pure rules, matches of many agents, and how they are rated."""

from saltire.games.agents import SCRIPTED, Agent, Ask, Reply, ScriptedAgent, scripted
from saltire.games.catalogue import GAMES, make
from saltire.games.game import FORMAT_PENALTY, Game, IllegalMove, Payoff
from saltire.games.matches import Fixture, play
from saltire.games.ratings import Rating, rate
from saltire.games.records import MatchRecord, TurnRecord, read_records, replay, write_records
from saltire.games.reply import THINK_THEN_ACT, split_reply
from saltire.games.tournament import round_robin

__all__ = [
    "FORMAT_PENALTY",
    "GAMES",
    "SCRIPTED",
    "THINK_THEN_ACT",
    "Agent",
    "Ask",
    "Fixture",
    "Game",
    "IllegalMove",
    "MatchRecord",
    "Payoff",
    "Rating",
    "Reply",
    "ScriptedAgent",
    "TurnRecord",
    "make",
    "play",
    "rate",
    "read_records",
    "replay",
    "round_robin",
    "scripted",
    "split_reply",
    "write_records",
]
