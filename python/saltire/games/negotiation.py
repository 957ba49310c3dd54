"""Simple Negotiation: trade goods that the two players value differently; the larger gain wins."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar

from saltire.games.game import Game, IllegalMove, Payoff, check_positive, draw, lost_by_forfeit, win
from saltire.games.reply import one_line

GOODS = ("Wheat", "Wood", "Sheep", "Brick", "Ore")
BASE_VALUE = {"Wheat": 5, "Wood": 10, "Sheep": 15, "Brick": 25, "Ore": 40}
FEWEST, MOST = 5, 25  # of every good at the start
LOWEST_VALUE, HIGHEST_VALUE = 5, 40
_PLURALS = {"Sheeps": "Sheep", "Woods": "Wood"}

_ACCEPT = re.compile(r"\[accept\]", re.IGNORECASE)
_OFFER = re.compile(r"\[offer([^\[\]]+)\]", re.IGNORECASE)
_AMOUNT = re.compile(r"(?<!\d)(\d{1,9})\s+([A-Za-z]+)")

Bundle = tuple[int, int, int, int, int]  # one count per good, in the order of GOODS


@dataclass(frozen=True)
class Offer:
    """``proposer`` gives ``gives`` for ``wants``."""

    proposer: int
    gives: Bundle
    wants: Bundle


@dataclass(frozen=True)
class Bid:
    """A move: whether it takes the standing offer, the offer it makes, and the words."""

    accepts: bool
    offer: Offer | None
    words: str


@dataclass(frozen=True)
class Trade:
    """holdings and values per player; offer: the one that stands; said: every move so far."""

    holdings: tuple[Bundle, Bundle]
    values: tuple[Bundle, Bundle]
    start: tuple[Bundle, Bundle]
    offer: Offer | None = None
    said: tuple[str, ...] = ()
    result: Payoff | None = None


@dataclass(frozen=True)
class Negotiation(Game[Trade, Bid]):
    """At most ``turns`` moves; then the player whose goods gained more value wins.

    An offer stands until it is accepted or another one is made, whoever makes it; accepting one's
    own takes it back. These are TextArena's rules, as is the number of turns: it announces 10
    and checks before it counts.
    """

    name: ClassVar[str] = "negotiation"

    turns: int = 11

    def __post_init__(self) -> None:
        check_positive(self.name, turns=self.turns)

    def reset(self, seed: int, players: int | None = None) -> Trade:
        self.check_players(players)
        random = Random(seed)
        holdings = (_draw_holdings(random), _draw_holdings(random))
        return Trade(holdings, (self._draw_values(random), self._draw_values(random)), holdings)

    def _draw_values(self, random: Random) -> Bundle:
        """Within a fifth of the base value, and inside the bounds."""

        def value(base: int) -> int:
            low, high = max(base - base // 5, LOWEST_VALUE), min(base + base // 5, HIGHEST_VALUE)
            return random.randint(low, high)

        return _bundle({good: value(base) for good, base in BASE_VALUE.items()})

    def turn(self, state: Trade) -> int:
        return len(state.said) % 2

    def gain(self, state: Trade, player: int) -> int:
        """How much more the player's goods are worth to it than at the start."""
        pairs = zip(state.holdings[player], state.start[player], state.values[player], strict=True)
        return sum((now - before) * value for now, before, value in pairs)

    def observe(self, state: Trade, player: int) -> str:
        rows = zip(GOODS, state.holdings[player], state.values[player], strict=True)
        goods = "\n".join(f"- {count} {good}, worth {value} each" for good, count, value in rows)
        said = "\n".join(f"Player {i % 2}: {one_line(m)}" for i, m in enumerate(state.said))
        text = (
            "In a negotiation of two, each player holds goods; the other player values the same "
            "goods differently. After "
            f"{self.turns} moves, the player whose goods gained more value wins.\n"
            "Say what you like, and put your action in brackets: "
            "[Offer: 2 Wood -> 1 Ore] gives the first for the second, [Accept] takes the standing "
            "offer, [Deny] does not.\n"
        )
        if said:
            text += f"\n{said}\n"
        text += f"\nYou are player {player}. You hold, at your own values:\n{goods}\n"
        if state.offer is not None:
            text += (
                f"\nStanding offer of player {state.offer.proposer}: "
                f"{_in_words(state.offer.gives)} -> {_in_words(state.offer.wants)}\n"
            )
        return text + f"\nMoves so far: {len(state.said)} of {self.turns}.\n"

    def legal(self, state: Trade) -> tuple[str, ...]:
        player = self.turn(state)
        moves = ["Let us talk.", "[Deny]"]
        have = [g for g, count in zip(GOODS, state.holdings[player], strict=True) if count]
        if have:
            moves.append(f"[Offer: 1 {have[0]} -> 1 {GOODS[-1]}]")
        if state.offer is not None and _covers(state.holdings[player], state.offer.wants):
            moves.append("[Accept]")
        return tuple(moves)

    def parse_action(self, state: Trade, text: str) -> Bid:
        player = self.turn(state)
        accepts = state.offer is not None and _ACCEPT.search(text) is not None
        mine = state.holdings[player]
        if accepts and state.offer is not None:
            if not _covers(mine, state.offer.wants):
                raise IllegalMove("you accepted an offer that asks for more than you hold")
            mine = _exchange(state.holdings, state.offer, player)[player]
        match = _OFFER.search(text)
        if match is None:
            return Bid(accepts, None, text)
        offer = _parse_offer(player, match[1])
        if not _covers(mine, offer.gives):
            raise IllegalMove("you offered more than you hold")
        return Bid(accepts, offer, text)

    def step(self, state: Trade, move: Bid) -> Trade:
        holdings, offer = state.holdings, state.offer
        if move.accepts and offer is not None:
            holdings, offer = _exchange(holdings, offer, self.turn(state)), None
        state = replace(
            state, holdings=holdings, offer=move.offer or offer, said=(*state.said, move.words)
        )
        if len(state.said) < self.turns:
            return state
        return replace(state, result=self._judge(state))

    def _judge(self, state: Trade) -> Payoff:
        gains = self.gain(state, 0), self.gain(state, 1)
        reason = f"Gains in value: {gains[0]} and {gains[1]}."
        return draw(reason) if gains[0] == gains[1] else win(int(gains[1] > gains[0]), reason)

    def forfeit(self, state: Trade, reason: str) -> Trade:
        return replace(state, result=lost_by_forfeit(self.turn(state), reason))

    def payoff(self, state: Trade) -> Payoff | None:
        return state.result


@dataclass(frozen=True)
class NegotiationRandomValue(Negotiation):
    """The out-of-distribution variant: values say nothing about the other player's."""

    name: ClassVar[str] = "negotiation-random-value"

    def _draw_values(self, random: Random) -> Bundle:
        return _bundle({good: random.randint(LOWEST_VALUE, HIGHEST_VALUE) for good in GOODS})


def _draw_holdings(random: Random) -> Bundle:
    return _bundle({good: random.randint(FEWEST, MOST) for good in GOODS})


def _bundle(counts: Mapping[str, int]) -> Bundle:
    wheat, wood, sheep, brick, ore = (counts.get(good, 0) for good in GOODS)
    return wheat, wood, sheep, brick, ore


def _parse_offer(proposer: int, terms: str) -> Offer:
    sides = terms.split("->")
    if len(sides) != 2:
        raise IllegalMove("an offer has the form [Offer: 2 Wood -> 1 Ore], with one arrow")
    return Offer(proposer, _parse_bundle(sides[0]), _parse_bundle(sides[1]))


def _parse_bundle(text: str) -> Bundle:
    counts: dict[str, int] = {}
    for number, word in _AMOUNT.findall(text):
        good = _PLURALS.get(word.title(), word.title())
        if good not in GOODS:
            raise IllegalMove(f"'{word}' is not a good; the goods are {', '.join(GOODS)}")
        if int(number) == 0:
            raise IllegalMove("an offer names counts of at least 1")
        counts[good] = counts.get(good, 0) + int(number)
    if not counts:
        raise IllegalMove("each side of an offer names a count and a good, like 2 Wood")
    return _bundle(counts)


def _covers(holding: Bundle, needed: Bundle) -> bool:
    return all(have >= need for have, need in zip(holding, needed, strict=True))


def _exchange(holdings: tuple[Bundle, Bundle], offer: Offer, taker: int) -> tuple[Bundle, Bundle]:
    """Holdings after ``taker`` accepts; nothing moves when it is the proposer itself."""
    if taker == offer.proposer:
        return holdings
    gives, wants = offer.gives, offer.wants
    flow = [w - g for g, w in zip(gives, wants, strict=True)]  # into the proposer's hands

    def moved(holding: Bundle, sign: int) -> Bundle:
        changed = (have + sign * change for have, change in zip(holding, flow, strict=True))
        return _bundle(dict(zip(GOODS, changed, strict=True)))

    first, second = (moved(holdings[p], 1 if p == offer.proposer else -1) for p in (0, 1))
    return first, second


def _in_words(bundle: Bundle) -> str:
    return ", ".join(f"{count} {good}" for good, count in zip(GOODS, bundle, strict=True) if count)
