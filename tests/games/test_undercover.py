"""Undercover: a game of many players with two roles."""

from __future__ import annotations

import pytest

from saltire.games import FORMAT_PENALTY, IllegalMove, make
from saltire.games.undercover import Round

GAME = make("undercover")


def round_of(players=5, spies=(0,)):
    words = tuple("pear" if p in spies else "apple" for p in range(players))
    return Round(words, frozenset(spies), tuple(range(players)))


def clues(state):
    for _ in state.alive:
        state = GAME.step(state, GAME.parse_action(state, "It grows."))
    return state


def votes(state, *choices):
    for choice in choices:
        state = GAME.step(state, GAME.parse_action(state, f"I say [Vote: {choice}]"))
    return state


def test_voting_out_the_only_spy_wins_for_the_civilians():
    payoff = GAME.payoff(votes(clues(round_of()), 1, 0, 0, 0, 0))
    assert payoff.outcome == "civilians"
    assert payoff.rewards == (-1.0, 1.0, 1.0, 1.0, 1.0)


def test_spies_win_when_they_are_half():
    state = votes(clues(round_of()), 1, 2, 1, 1, 1)
    assert GAME.payoff(state) is None
    state = votes(clues(state), 2, 3, 2, 2)
    assert GAME.payoff(state) is None
    payoff = GAME.payoff(votes(clues(state), 3, 4, 3))
    assert payoff.outcome == "spies"
    assert payoff.rewards == (1.0, -1.0, -1.0, -1.0, -1.0)


def test_a_tie_votes_nobody_out():
    state = votes(clues(round_of(4)), 1, 0, 1, 0)
    assert state.alive == (0, 1, 2, 3)
    assert state.number == 2


def test_spies_win_when_the_rounds_are_over():
    state = round_of(4)
    for _ in range(GAME.rounds):
        assert GAME.payoff(state) is None
        state = votes(clues(state), 1, 0, 1, 0)
    assert GAME.payoff(state).outcome == "spies"


def test_votes_stay_hidden_until_all_have_voted():
    state = clues(round_of())
    assert GAME.observe(votes(state, 1), 3) == GAME.observe(votes(state, 2), 3)
    assert "Player 0 votes for player 1." in GAME.observe(votes(state, 1, 2, 1, 1, 1), 3)


def test_a_forfeit_takes_out_one_player_and_its_votes_and_the_others_go_on():
    state = votes(clues(round_of(6)), 1, 0)  # player 2 is next
    state = GAME.forfeit(state, "silence")
    assert state.alive == (0, 1, 3, 4, 5)
    assert GAME.turn(state) == 3
    state = votes(state, 1)
    state = GAME.forfeit(state, "silence")  # player 4
    payoff = GAME.payoff(votes(state, 0))
    assert payoff is None or payoff.forfeits == (2, 4)
    final = GAME.payoff(votes(clues(votes(state, 0)), 1, 0, 0, 0)) or payoff
    assert final.rewards[2] == final.rewards[4] == FORMAT_PENALTY


def test_votes_for_a_player_who_leaves_are_cast_again():
    state = votes(clues(round_of(6)), 1, 2)
    state = GAME.forfeit(state, "silence")  # player 2 leaves, player 1's vote is void
    state = votes(state)
    assert GAME.turn(state) == 1


@pytest.mark.parametrize("text", ["[Vote: 0]", "[Vote: 9]", "player 2", "[Vote: x]"])
def test_a_vote_for_oneself_or_nobody_is_illegal(text):
    with pytest.raises(IllegalMove):
        GAME.parse_action(clues(round_of()), text)


def test_a_clue_without_limits_or_with_the_word_is_illegal():
    with pytest.raises(IllegalMove, match="your own word"):
        GAME.parse_action(round_of(), "Like an appleless Pear")
    with pytest.raises(IllegalMove, match="at most 25 words"):
        GAME.parse_action(round_of(), "so " * 26)


def test_larger_tables_have_two_spies():
    assert [len(GAME.reset(1, n).spies) for n in range(4, 9)] == [1, 1, 1, 2, 2]
