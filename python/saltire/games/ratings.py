"""Rating agents by their matches: win rates and Bradley-Terry strengths, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from saltire.errors import SaltireError
from saltire.games.records import MatchRecord

ELO_PER_NAT = 400 / np.log(10)  # a strength e times as large is this many Elo points more
ITERATIONS = 200
# Each pair that met is taken to have drawn half a match more, so that an agent that won all has a
# finite strength.
PRIOR = 0.5

Array = np.ndarray


@dataclass(frozen=True)
class Rating:
    """wins, draws, losses: duels, one for each opponent in each match. win_rate counts a draw as
    half. elo: Bradley-Terry strength in Elo points, 0 on average. Intervals are central ones."""

    agent: str
    wins: int
    draws: int
    losses: int
    forfeits: int
    win_rate: float
    win_rate_interval: tuple[float, float]
    elo: float
    elo_interval: tuple[float, float]


def rate(
    records: Iterable[MatchRecord], level: float = 0.9, resamples: int = 1000, seed: int = 0
) -> list[Rating]:
    """Ratings of all agents, best first.

    In a match, each pair of players with different agents is a duel, won by the larger reward.
    Intervals are of a bootstrap over deals: matches with one seed stay together, for they are the
    same deal with seats changed. Matches that crashed do not count. Raises SaltireError if none is
    left in which two agents met.
    """
    played = [r for r in records if not r.error and len(set(r.agents)) > 1]
    if not played:
        raise SaltireError("no match in which two different agents met has ended; nothing to rate.")
    names = sorted({agent for r in played for agent in r.agents})
    deals: dict[int, Array] = {}
    for record in played:
        deals.setdefault(record.seed, np.zeros((3, len(names), len(names))))
        deals[record.seed] += _duels(record, names)
    table = np.stack(list(deals.values()))  # [deals, win/draw/loss, agent, opponent]
    whole = table.sum(axis=0)
    random = np.random.default_rng(seed)
    counts = random.multinomial(len(table), np.full(len(table), 1 / len(table)), resamples)
    samples = np.einsum("rd,dkij->rkij", counts, table)
    edges = (1 - level) / 2, (1 + level) / 2
    rates = np.quantile(win_rates(samples), edges, axis=0)
    elos = np.quantile(strengths(samples), edges, axis=0)
    rate_now, elo_now = win_rates(whole[None])[0], strengths(whole[None])[0]
    forfeits = dict.fromkeys(names, 0)
    for record in played:
        for player in record.forfeits:
            forfeits[record.agents[player]] += 1
    ratings = [
        Rating(
            name,
            int(whole[0, i].sum()),
            int(whole[1, i].sum()),
            int(whole[2, i].sum()),
            forfeits[name],
            float(rate_now[i]),
            (float(rates[0, i]), float(rates[1, i])),
            float(elo_now[i]),
            (float(elos[0, i]), float(elos[1, i])),
        )
        for i, name in enumerate(names)
    ]
    return sorted(ratings, key=lambda rating: (-rating.elo, rating.agent))


def win_rates(table: Array) -> Array:
    """(wins + draws / 2) / duels. table: [R, 3, agents, opponents]; returns [R, agents]."""
    won, drawn, lost = (table[:, k].sum(axis=-1) for k in range(3))
    return (won + drawn / 2) / np.maximum(won + drawn + lost, 1)


def strengths(table: Array) -> Array:
    """Bradley-Terry strengths in Elo points, mean 0. table: [R, 3, agents, opponents].

    P(i beats j) = e^{s_i} / (e^{s_i} + e^{s_j}), a draw being half a win for each. The maximum of
    the likelihood by Hunter's MM iteration, w_i <- W_i / sum_j N_ij / (w_i + w_j).
    """
    met = (table.sum(axis=1) + table.sum(axis=1).transpose(0, 2, 1)) > 0
    won = table[:, 0] + table[:, 1] / 2 + PRIOR / 2 * met
    duels = won + won.transpose(0, 2, 1)
    weights = np.ones(won.shape[:2])
    for _ in range(ITERATIONS):
        pairs = weights[:, :, None] + weights[:, None, :]
        weights = won.sum(axis=2) / np.maximum((duels / pairs).sum(axis=2), 1e-12)
        weights = np.maximum(weights, 1e-12)
        weights /= np.exp(np.log(weights).mean(axis=1, keepdims=True))
    result: Array = np.log(weights) * ELO_PER_NAT
    return result


def _duels(record: MatchRecord, names: Sequence[str]) -> Array:
    """[win/draw/loss, agent, opponent] of one match."""
    table = np.zeros((3, len(names), len(names)))
    for i, j in combinations(range(len(record.agents)), 2):
        first, second = names.index(record.agents[i]), names.index(record.agents[j])
        if first == second:
            continue
        difference = record.rewards[i] - record.rewards[j]
        result = 0 if difference > 0 else 1 if difference == 0 else 2
        table[result, first, second] += 1
        table[2 - result, second, first] += 1
    return table
