"""The same rules: matches that TextArena ended end the same way in our games."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from saltire.games import IllegalMove, make
from saltire.games.two_dollar import Split
from saltire.games.two_dollar_briefs import BRIEFS
from tests.games.record_textarena import RECORDED, recorded_matches

BY_NAME = {brief.name: brief for brief in BRIEFS}


def dealt(name: str, game, match: dict[str, Any]):
    """Our first state, with what TextArena dealt. A negotiation's seed deals the same in both."""
    if name == "two-dollar":
        first, second = (BY_NAME[brief] for brief in match["briefs"])
        return Split((first, second), 200)
    state = game.reset(match["seed"])
    if name == "dont-say-it":
        return replace(state, words=tuple(match["words"]))
    assert [list(bundle) for bundle in state.holdings] == match["holdings"]
    assert [list(bundle) for bundle in state.values] == match["values"]
    return state


@pytest.mark.parametrize("name", RECORDED)
def test_a_match_ends_as_textarena_ended_it(name) -> None:
    game, found = make(name), set()
    for match in recorded_matches(name):
        state = dealt(name, game, match)
        for reply in match["replies"]:
            assert game.payoff(state) is None, match
            try:
                move = game.parse_action(state, reply)
            except IllegalMove as illegal:
                state = game.forfeit(state, str(illegal))
            else:
                state = game.step(state, move)
        payoff = game.payoff(state)
        assert payoff is not None, match
        first, second = match["rewards"]
        assert payoff.outcome == ("draw" if first == second else f"player {int(second > first)}")
        assert list(payoff.forfeits) == match["invalid"], match
        found.add((payoff.outcome, bool(payoff.forfeits)))
    ends = {("player 0", False), ("player 1", False), ("draw", False)}
    assert ends <= found
    assert name == "dont-say-it" or found - ends  # there every reply is a move
