"""Two Dollar: agree on how to split a sum while each player follows secret instructions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from saltire.games.game import Game, IllegalMove, Payoff, check_positive, draw, lost_by_forfeit, win
from saltire.games.reply import one_line
from saltire.games.two_dollar_briefs import BRIEFS, Brief

_AMOUNT = re.compile(r"\[Propose\]\s*\$(\d{1,9})(?:\.(\d+))?")
_MARKS = ("[Propose]", "[Accept]", "[Reject]")


@dataclass(frozen=True)
class Said:
    """A move: kind is "propose", "accept" or "reject"; cents: what the proposer wants."""

    player: int
    kind: str
    cents: int
    words: str


@dataclass(frozen=True)
class Split:
    """briefs: each player's secret instructions; total in cents; said: every move so far."""

    briefs: tuple[Brief, Brief]
    total: int
    said: tuple[Said, ...] = ()
    result: Payoff | None = None

    @property
    def proposal(self) -> Said | None:
        """The proposal to answer: the last move, if it was one."""
        return self.said[-1] if self.said and self.said[-1].kind == "propose" else None


@dataclass(frozen=True)
class TwoDollar(Game[Split, Said]):
    """At most ``turns`` moves; a player whose brief is not met gets nothing; more money wins.

    Amounts are whole cents, so that a concession of one cent is one cent: TextArena compares floats
    and calls $1.50 after $1.51 too large a concession.
    """

    name: ClassVar[str] = "two-dollar"

    turns: int = 20

    def __post_init__(self) -> None:
        check_positive(self.name, turns=self.turns)

    def reset(self, seed: int, players: int | None = None) -> Split:
        self.check_players(players)
        random = Random(seed)
        first, second = random.sample(BRIEFS, 2)
        return Split((first, second), self._draw_total(random))

    def _draw_total(self, random: Random) -> int:
        return 200

    def turn(self, state: Split) -> int:
        return len(state.said) % 2

    def observe(self, state: Split, player: int) -> str:
        brief = state.briefs[player]
        said = "\n".join(_line(move, state.total) for move in state.said)
        return (
            f"Two players must split {_dollars(state.total)} between them.\n"
            f"Without a deal within {self.turns} moves both get nothing. "
            "Whoever gets more wins, and who breaks the secret instructions gets nothing.\n"
            "Argue first, then end with one action: [Propose] $X.XX names what you want for "
            "yourself, [Accept] takes the other player's proposal, [Reject] turns it down.\n"
            + (f"\n{said}\n" if said else "")
            + f"\nYou are player {player}. Your secret instructions: "
            f"{brief.text(state.total, self.turns)}\n"
            f"Moves so far: {len(state.said)} of {self.turns}.\n"
        )

    def legal(self, state: Split) -> tuple[str, ...]:
        player = self.turn(state)
        asked = [m.cents for m in state.said if m.player == player and m.kind == "propose"]
        cents = asked[-1] if asked else state.total // 2
        answers = ("[Accept]", "[Reject]") if state.proposal else ()
        return (f"[Propose] ${cents // 100}.{cents % 100:02}", *answers)

    def parse_action(self, state: Split, text: str) -> Said:
        player, text = self.turn(state), text.strip()
        found = [mark for mark in _MARKS if mark in text]
        if len(found) != 1:
            raise IllegalMove("a move holds exactly one of [Propose] $X.XX, [Accept], [Reject]")
        kind = found[0].strip("[]").lower()
        cents = _parse_cents(text, state.total) if kind == "propose" else 0
        if kind != "propose" and state.proposal is None:
            raise IllegalMove(f"there is no proposal to {kind}")
        brief = state.briefs[player]
        words = text.partition("[")[0].split()
        if brief.most_words is not None and len(words) > brief.most_words:
            raise IllegalMove(f"your instructions allow {brief.most_words} words, not {len(words)}")
        own = [m.cents for m in state.said if m.player == player and m.kind == "propose"]
        if brief.largest_concession is not None and kind == "propose" and own:
            conceded = own[-1] - cents
            if conceded > brief.largest_concession:
                raise IllegalMove(f"your instructions do not allow you to give up {conceded} cents")
        return Said(player, kind, cents, text.partition(found[0])[0].strip())

    def step(self, state: Split, move: Said) -> Split:
        proposal = state.proposal
        state = replace(state, said=(*state.said, move))
        if move.kind == "accept" and proposal is not None:
            return replace(state, result=self._settle(state, proposal))
        if len(state.said) >= self.turns:
            return replace(state, result=draw("No deal: both get nothing."))
        return state

    def _settle(self, state: Split, deal: Said) -> Payoff:
        accepter = 1 - deal.player
        money = [0, 0]
        money[deal.player], money[accepter] = deal.cents, state.total - deal.cents
        for player, brief in enumerate(state.briefs):
            if brief.share is not None and money[player] * 100 < brief.share * state.total:
                money[player] = 0
            # The brief asks the player itself to accept, as in TextArena: being accepted is late.
            in_time = player == accepter and len(state.said) <= self.turns // 2
            if brief.deadline and not in_time:
                money[player] = 0
        reason = f"Deal: {_dollars(money[0])} and {_dollars(money[1])} after the instructions."
        return draw(reason) if money[0] == money[1] else win(int(money[1] > money[0]), reason)

    def forfeit(self, state: Split, reason: str) -> Split:
        return replace(state, result=lost_by_forfeit(self.turn(state), reason))

    def payoff(self, state: Split) -> Payoff | None:
        return state.result


@dataclass(frozen=True)
class TwoDollarVariableSum(TwoDollar):
    """The out-of-distribution variant: the sum differs from match to match, $1.00 to $5.00."""

    name: ClassVar[str] = "two-dollar-variable-sum"

    def _draw_total(self, random: Random) -> int:
        return random.randrange(100, 501, 10)


def _parse_cents(text: str, total: int) -> int:
    match = _AMOUNT.search(text)
    if match is None:
        raise IllegalMove("a proposal has the form [Propose] $1.20")
    decimals = (match[2] or "").rstrip("0")
    if len(decimals) > 2:
        raise IllegalMove("a proposal is in whole cents")
    cents = int(match[1]) * 100 + int(decimals.ljust(2, "0"))
    if cents > total:
        raise IllegalMove(f"a proposal lies between $0.00 and {_dollars(total)}")
    return cents


def _dollars(cents: int) -> str:
    return f"${cents // 100}.{cents % 100:02}"


def _line(move: Said, total: int) -> str:
    words = f"{one_line(move.words)} " if move.words else ""
    if move.kind == "propose":
        mine, yours = _dollars(move.cents), _dollars(total - move.cents)
        return f"Player {move.player}: {words}[Propose] {mine} for me, {yours} for you"
    return f"Player {move.player}: {words}[{move.kind.title()}]"
