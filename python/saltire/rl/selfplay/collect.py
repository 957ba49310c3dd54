"""One step's matches: who sits where, what the learner wrote, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from saltire.errors import SaltireError
from saltire.games import Agent, Fixture, Game, MatchRecord, play
from saltire.rl.distributed import gather, share
from saltire.rl.match_outcome import MatchOutcome
from saltire.rl.policy import Sequences, pack
from saltire.rl.selfplay.agents import ModelAgent, Turn

LEARNER = "learner"


@dataclass(frozen=True)
class Played:
    """This rank's matches of one step, without those that crashed.

    seats: the learner's in each match. turns: what it wrote, ordered by match, player and turn.
    crashed: of this rank."""

    records: list[MatchRecord]
    seats: list[tuple[int, ...]]
    turns: list[Turn]
    crashed: list[MatchRecord]

    def outcomes(self) -> list[MatchOutcome]:
        """As the advantages see them: the learner's seats alone, for another's rewards say nothing
        about the learner."""
        return [
            MatchOutcome(
                record.game,
                record.outcome,
                tuple(record.roles[seat] for seat in seats),
                tuple(record.rewards[seat] for seat in seats),
                record.forfeits,
            )
            for record, seats in zip(self.records, self.seats, strict=True)
        ]

    def sequences(self, pad: int) -> Sequences:
        """Each reply after its prompt."""
        return pack([t.prompt for t in self.turns], [t.completion for t in self.turns], pad)

    def by_turn(self, advantages: Sequence[tuple[float, ...]]) -> list[float]:
        """The advantage of each turn: its player's in its match."""
        value = {
            (record.number, seat): advantage
            for record, seats, many in zip(self.records, self.seats, advantages, strict=True)
            for seat, advantage in zip(seats, many, strict=True)
        }
        return [value[turn.match, turn.player] for turn in self.turns]


def seat(number: int, players: int, other: str, part: float) -> tuple[str, ...]:
    """Who sits where in match ``number`` of a step: a share ``part`` of the matches, evenly
    spread, seats ``other`` everywhere but in one place, which goes round; the rest is self-play."""
    before, after = int(number * part), int((number + 1) * part)
    if not other or before == after:
        return (LEARNER,) * players
    return tuple(LEARNER if p == before % players else other for p in range(players))


def collect(
    game: Game[Any, Any],
    players: int,
    agents: Mapping[str, Agent],
    other: str,
    part: float,
    matches: int,
    in_flight: int,
    seed: int,
    step: int,
) -> Played:
    """Play this rank's part of the step's matches.

    What a match holds depends on its number in the step, never on the rank that plays it. Raises
    SaltireError if all matches of all ranks crashed.
    """
    learner = agents[LEARNER]
    assert isinstance(learner, ModelAgent)
    learner.step, learner.taken = step, []
    fixtures = [
        Fixture(n, deal(seed, step, n), seat(n, players, other, part))
        for n in share(matches, "matches.matches")
    ]
    records = sorted(play(game, agents, fixtures, in_flight), key=lambda record: record.number)
    whole = [record for record in records if not record.error]
    crashed = [record for record in records if record.error]
    if not gather([record.number for record in whole]):
        raise SaltireError(
            f"every match of step {step} crashed; the first of this rank: {crashed[0].error}"
        )
    kept = {record.number for record in whole}
    turns = sorted(
        (turn for turn in learner.taken if turn.match in kept),
        key=lambda turn: (turn.match, turn.player, turn.turn),
    )
    learner.taken = []
    seats = [
        tuple(p for p, agent in enumerate(record.agents) if agent == LEARNER) for record in whole
    ]
    return Played(whole, seats, turns, crashed)


def deal(seed: int, step: int, number: int) -> int:
    """The seed of a match's deal."""
    return Random(f"{seed}/{step}/{number}/deal").getrandbits(31)
