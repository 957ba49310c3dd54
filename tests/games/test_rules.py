"""What holds for every game, whatever is played."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.games import FORMAT_PENALTY, GAMES, IllegalMove, make

names = st.sampled_from(sorted(GAMES))
seeds = st.integers(0, 2**31)


def _players(game, random):
    return random.randint(game.min_players, game.max_players)


def _play(game, seed, moves=200, forfeit_rate=0.0):
    """States of a random match, last one over."""
    random = Random(seed)
    states = [game.reset(seed, _players(game, random))]
    while game.payoff(states[-1]) is None:
        assert len(states) < moves, "the match does not end"
        state = states[-1]
        if random.random() < forfeit_rate:
            states.append(game.forfeit(state, "nothing legal"))
        else:
            text = random.choice(game.legal(state))
            states.append(game.step(state, game.parse_action(state, text)))
    return states


@settings(max_examples=150, deadline=None)
@given(names, seeds, st.sampled_from([0.0, 0.05, 0.5]))
def test_every_match_ends_with_one_reward_per_player_and_a_known_outcome(name, seed, rate):
    game = make(name)
    states = _play(game, seed, forfeit_rate=rate)
    payoff = game.payoff(states[-1])
    assert payoff.outcome in game.outcomes
    assert all(-1.0 <= r <= 1.0 or r == FORMAT_PENALTY for r in payoff.rewards)
    assert {p for p, r in enumerate(payoff.rewards) if r == FORMAT_PENALTY} == set(payoff.forfeits)
    assert len(payoff.rewards) >= game.min_players
    assert all(game.role(states[0], p) in game.roles for p in range(len(payoff.rewards)))


@settings(max_examples=60, deadline=None)
@given(names, seeds)
def test_two_players_rewards_sum_to_nothing_unless_someone_forfeits(name, seed):
    game = make(name)
    if game.max_players == 2:
        assert sum(game.payoff(_play(game, seed)[-1]).rewards) == 0


@settings(max_examples=60, deadline=None)
@given(names, seeds)
def test_same_seed_and_moves_give_the_same_match(name, seed):
    assert _play(make(name), seed) == _play(make(name), seed)


@settings(max_examples=60, deadline=None)
@given(names, seeds)
def test_a_step_leaves_the_earlier_state_as_it_was(name, seed):
    game = make(name)
    state = game.reset(seed)
    before = repr(state)
    game.step(state, game.parse_action(state, game.legal(state)[0]))
    assert repr(state) == before


@settings(max_examples=200, deadline=None)
@given(names, seeds, st.text(max_size=200))
def test_any_text_is_a_move_or_an_illegal_move(name, seed, text):
    game = make(name)
    state = game.reset(seed)
    with contextlib.suppress(IllegalMove):  # and nothing else
        game.step(state, game.parse_action(state, text))


@settings(max_examples=100, deadline=None)
@given(names, seeds)
def test_nobody_is_told_what_is_secret(name, seed):
    """Two deals that differ only in what the other player holds look the same to this one."""
    game = make(name)
    state = game.reset(seed)
    if name.startswith("dont-say-it"):
        other = replace(state, words=(state.words[0], "something else"))
    elif name.startswith("negotiation"):
        holdings = (state.holdings[0], (1, 2, 3, 4, 5))
        other = replace(state, holdings=holdings, values=(state.values[0], (5, 5, 5, 5, 5)))
    elif name.startswith("two-dollar"):
        other = replace(state, briefs=(state.briefs[0], state.briefs[0]))
    elif name == "undercover":
        words = (state.words[0], *("another",) * (len(state.words) - 1))
        other = replace(state, words=words, spies=frozenset({2}))
    else:
        other = replace(state, beasts=(state.beasts[0], state.beasts[0]))
    assert game.observe(state, 0) == game.observe(other, 0)
    assert other != state


def test_an_unknown_game_names_the_nearest():
    with pytest.raises(SaltireError, match="Did you mean dont-say-it"):
        make("dont_say_itt")
    with pytest.raises(SaltireError, match="The games are"):
        make("zzzz")


@pytest.mark.parametrize("turns", [0, -3, "many", 1.5, True])
def test_a_senseless_option_is_refused(turns):
    with pytest.raises(SaltireError, match="turns must be a whole number"):
        make("negotiation", turns=turns)


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(SaltireError, match="its options are turns, whole_words"):
        make("dont-say-it", rounds=3)


@pytest.mark.parametrize(("name", "players"), [("undercover", 3), ("undercover", 9), ("boast", 3)])
def test_a_wrong_number_of_players_is_refused(name, players):
    with pytest.raises(SaltireError, match=f"{players} were given"):
        make(name).reset(0, players)


def test_options_and_name_make_the_game_again():
    for name in GAMES:
        game = make(name)
        assert make(game.name, **game.options()) == game
