"""Undercover: everyone describes a secret word, and a few were given a related one."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from saltire.games.game import FORMAT_PENALTY, Game, IllegalMove, Payoff, check_positive
from saltire.games.reply import one_line
from saltire.games.words import word_pairs

_VOTE = re.compile(r"\[vote:?\s*(?:player\s*)?(\d{1,3})\]", re.IGNORECASE)


@dataclass(frozen=True)
class Act:
    """A move: a clue, or a vote for player ``vote``."""

    words: str
    vote: int | None = None


@dataclass(frozen=True)
class Round:
    """words per player; spies and forfeits: players; alive: who is still in, in order of speech.

    clues and votes of this round as (player, what); history: lines of earlier rounds.
    """

    words: tuple[str, ...]
    spies: frozenset[int]
    alive: tuple[int, ...]
    number: int = 1
    clues: tuple[tuple[int, str], ...] = ()
    votes: tuple[tuple[int, int], ...] = ()
    history: tuple[str, ...] = ()
    forfeits: tuple[int, ...] = ()
    result: Payoff | None = None


@dataclass(frozen=True)
class Undercover(Game[Round, Act]):
    """Each round every player in the match gives a clue, then all vote one player out.

    Nobody knows whether their own word is the odd one. A tie votes nobody out. The civilians win
    when no spy is left; the spies win when as many of them as civilians are left, or after
    ``rounds`` rounds. A forfeit takes its player out with FORMAT_PENALTY, and the others go on.
    """

    name: ClassVar[str] = "undercover"
    roles: ClassVar[tuple[str, ...]] = ("civilian", "spy")
    outcomes: ClassVar[tuple[str, ...]] = ("civilians", "spies")
    min_players: ClassVar[int] = 4
    max_players: ClassVar[int] = 8

    rounds: int = 6
    longest_clue: int = 25  # words

    def __post_init__(self) -> None:
        check_positive(self.name, rounds=self.rounds, longest_clue=self.longest_clue)

    def reset(self, seed: int, players: int | None = None) -> Round:
        count = self.check_players(players)
        random = Random(seed)
        common, odd = random.sample(random.choice(word_pairs()), 2)
        spies = frozenset(random.sample(range(count), 1 if count < 7 else 2))
        words = tuple(odd if p in spies else common for p in range(count))
        return Round(words, spies, tuple(random.sample(range(count), count)))

    def turn(self, state: Round) -> int:
        done = {p for p, _ in (state.votes if self._voting(state) else state.clues)}
        return next(p for p in state.alive if p not in done)

    def _voting(self, state: Round) -> bool:
        spoken = {p for p, _ in state.clues}
        return all(p in spoken for p in state.alive)

    def role(self, state: Round, player: int) -> str:
        return "spy" if player in state.spies else "civilian"

    def observe(self, state: Round, player: int) -> str:
        lines = [*state.history, *(f"Player {p}: {clue}" for p, clue in state.clues)]
        said = "\n".join(lines)
        task = (
            "Everyone has spoken. Your move is your vote: [Vote: K] for the number K of the player "
            "whose word you think is the odd one."
            if self._voting(state)
            else "Your move is your clue: one sentence about your word, without the word itself."
        )
        return (
            f"Undercover is a game of {len(state.words)} players.\n"
            "Most players have the same word; the spies have a related one, and nobody knows who "
            "has which.\n"
            "Each round everyone gives one clue, then all vote one player out. The majority wins "
            "when no spy is left, the spies win when they are as many as the rest or after "
            f"{self.rounds} rounds.\n"
            + (f"\n{said}\n" if said else "")
            + f"\nRound {state.number}; still in: {', '.join(map(str, sorted(state.alive)))}.\n"
            f"You are player {player}. Your word is '{state.words[player]}'.\n"
            f"{task}\n"
        )

    def legal(self, state: Round) -> tuple[str, ...]:
        if not self._voting(state):
            return ("Many people know it.", "I saw one last week.")
        player = self.turn(state)
        return tuple(f"[Vote: {p}]" for p in sorted(state.alive) if p != player)

    def parse_action(self, state: Round, text: str) -> Act:
        player = self.turn(state)
        if not self._voting(state):
            words = one_line(text)
            if len(words.split()) > self.longest_clue:
                raise IllegalMove(f"a clue has at most {self.longest_clue} words")
            if state.words[player].lower() in words.lower():
                raise IllegalMove("a clue must not hold your own word")
            return Act(words)
        match = _VOTE.search(text)
        if match is None:
            raise IllegalMove("a vote has the form [Vote: 2]")
        vote = int(match[1])
        if vote == player or vote not in state.alive:
            raise IllegalMove(f"player {vote} cannot be voted for")
        return Act(text, vote)

    def step(self, state: Round, move: Act) -> Round:
        player = self.turn(state)
        if move.vote is None:
            return replace(state, clues=(*state.clues, (player, move.words)))
        state = replace(state, votes=(*state.votes, (player, move.vote)))
        return self._count_votes(state)

    def forfeit(self, state: Round, reason: str) -> Round:
        player = self.turn(state)
        left = f"Player {player} is out: no legal move."
        state = replace(
            state,
            forfeits=(*state.forfeits, player),
            alive=tuple(p for p in state.alive if p != player),
            votes=tuple((by, vote) for by, vote in state.votes if vote != player),
            history=(*state.history, left),
        )
        return self._judge(state) if self._winner(state) else self._count_votes(state)

    def _count_votes(self, state: Round) -> Round:
        voted = {by for by, _ in state.votes}
        if not self._voting(state) or not all(p in voted for p in state.alive):
            return state
        (first, most), *rest = Counter(vote for _, vote in state.votes).most_common() or [(-1, 0)]
        out = None if not most or (rest and rest[0][1] == most) else first
        lines = [f"Round {state.number}:", *(f"Player {p}: {clue}" for p, clue in state.clues)]
        lines += [f"Player {by} votes for player {vote}." for by, vote in state.votes]
        lines.append("Nobody is voted out." if out is None else f"Player {out} is voted out.")
        state = replace(
            state,
            alive=tuple(p for p in state.alive if p != out),
            number=state.number + 1,
            clues=(),
            votes=(),
            history=(*state.history, *lines),
        )
        return self._judge(state)

    def _winner(self, state: Round) -> str | None:
        spies = sum(p in state.spies for p in state.alive)
        if spies == 0:
            return "civilians"
        if 2 * spies >= len(state.alive) or state.number > self.rounds:
            return "spies"
        return None

    def _judge(self, state: Round) -> Round:
        winner = self._winner(state)
        if winner is None:
            return state
        won = [(p in state.spies) == (winner == "spies") for p in range(len(state.words))]
        rewards = [1.0 if w else -1.0 for w in won]
        for player in state.forfeits:
            rewards[player] = FORMAT_PENALTY
        names = ", ".join(str(p) for p in sorted(state.spies))
        reason = f"The {winner} win; the spies were player {names}."
        return replace(state, result=Payoff(tuple(rewards), winner, reason, state.forfeits))

    def payoff(self, state: Round) -> Payoff | None:
        return state.result
