"""Who plays whom: every pair of agents, on the same deals, from both sides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from saltire.errors import SaltireError
from saltire.games.matches import Fixture


def round_robin(agents: Sequence[str], deals: int, seed: int, players: int = 2) -> list[Fixture]:
    """Fixtures in which each pair of agents plays every deal once from each side.

    With more than two players the agents take the seats in turn, and every deal is played once for
    each rotation of that order.
    """
    if len(agents) < 2 or len(set(agents)) != len(agents):
        raise SaltireError(
            f"a tournament needs two or more different agents; {', '.join(agents) or 'none'} came."
        )
    if deals < 1:
        raise SaltireError(f"{deals} deals; a tournament needs at least 1.")
    seatings: list[tuple[str, ...]] = []
    if players == 2:
        for a, b in combinations(agents, 2):
            seatings += [(a, b), (b, a)]
    else:
        n = len(agents)
        seatings = [tuple(agents[(start + i) % n] for i in range(players)) for start in range(n)]
    order = [(seed + deal, seats) for deal in range(deals) for seats in seatings]
    return [Fixture(number, deal, seats) for number, (deal, seats) in enumerate(order)]
