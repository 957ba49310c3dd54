"""How good the learner is by now: matches against an agent that stays as it is."""

from __future__ import annotations

from saltire.games import Agent, Fixture, play
from saltire.rl.distributed import all_sum, part_of
from saltire.rl.prompts import EVALUATION_STEP
from saltire.rl.selfplay.collect import LEARNER, deal
from saltire.rl.selfplay.config import SelfPlayConfig
from saltire.rl.selfplay.parts import SelfPlayParts


def win_rate(parts: SelfPlayParts, config: SelfPlayConfig) -> float:
    """Of the present policy against ``evaluation.agent``, a draw being half a win; all ranks play.

    A match is won by a reward above the mean of the others'. The deals, and the numbers that decide
    replies, are the same each time.
    """
    assert parts.measured_against is not None
    parts.refresh()
    parts.learner.step, parts.learner.keep = EVALUATION_STEP, False
    agents: dict[str, Agent] = {LEARNER: parts.learner, "other": parts.measured_against}
    fixtures = []
    for n in part_of(range(config.evaluation.matches)):
        seats = tuple(LEARNER if p == n % parts.players else "other" for p in range(parts.players))
        fixtures.append(Fixture(n, deal(config.seed, EVALUATION_STEP, n), seats))
    won = []
    for record in play(parts.game, agents, fixtures, config.matches.in_flight):
        if not record.error:
            own = record.rewards[record.agents.index(LEARNER)]
            others = (sum(record.rewards) - own) / (parts.players - 1)
            won.append(1.0 if own > others else 0.5 if own == others else 0.0)
    parts.learner.keep = True
    total, count = all_sum([sum(won), len(won)])
    return total / count if count else 0.0
