"""Rules of the paper's three games, case by case."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saltire.games import IllegalMove, make
from saltire.games.dont_say_it import Conversation
from saltire.games.negotiation import GOODS, Trade
from saltire.games.two_dollar import Split
from saltire.games.two_dollar_briefs import BRIEFS, Brief
from saltire.games.words import hard_nouns, plain_nouns, word_pairs

PLAIN = Brief("plain", "")
BY_NAME = {brief.name: brief for brief in BRIEFS}


def play(game, state, *texts):
    for text in texts:
        assert game.payoff(state) is None
        state = game.step(state, game.parse_action(state, text))
    return state


def test_saying_the_others_word_loses_and_saying_ones_own_does_not():
    game, start = make("dont-say-it"), Conversation(("oak", "tea"))
    state = play(game, start, "my oak is old", "Fancy some OAKEN furniture?")
    assert game.payoff(state).outcome == "player 0"  # "oaken" holds "oak", as in TextArena


def test_whole_words_forgives_a_word_inside_another():
    game, start = make("dont-say-it", whole_words=True), Conversation(("oak", "tea"))
    state = play(game, start, "hello", "Fancy some OAKEN furniture?")
    assert game.payoff(state) is None
    assert game.payoff(play(game, state, "no tea!")).outcome == "player 1"


def test_a_conversation_without_the_words_is_a_draw_after_its_last_message():
    game, state = make("dont-say-it", turns=4), Conversation(("oak", "tea"))
    state = play(game, state, "a", "b", "c", "d")
    assert game.payoff(state).rewards == (0.0, 0.0)


def test_the_hard_variant_deals_words_the_plain_game_never_deals():
    dealt = {w for seed in range(200) for w in make("dont-say-it-hard").reset(seed).words}
    assert dealt & set(hard_nouns())
    assert not {w for seed in range(200) for w in make("dont-say-it").reset(seed).words} & set(
        hard_nouns()
    )


def test_word_lists_hold_no_word_twice_and_only_lower_case_letters():
    words = plain_nouns() + hard_nouns()
    assert len(words) == len(set(words)) > 800
    assert all(word.isalpha() and word.islower() for word in words)
    pairs = word_pairs()
    assert len({frozenset(pair) for pair in pairs}) == len(pairs) > 100
    assert all(a != b and a not in b and b not in a for a, b in pairs)


def trade(**changes):
    start = ((10, 10, 10, 10, 10), (10, 10, 10, 10, 10))
    state = Trade(start, ((5, 10, 15, 25, 40), (5, 8, 12, 20, 35)), start)
    return replace(state, **changes)


def test_an_accepted_offer_moves_both_bundles():
    game = make("negotiation")
    state = play(game, trade(), "[Offer: 2 Wood, 1 wheat -> 1 Ore]", "Fine. [Accept]")
    assert state.holdings == ((9, 8, 10, 10, 11), (11, 12, 10, 10, 9))
    assert game.gain(state, 0) == 40 - 20 - 5
    assert game.gain(state, 1) == 16 + 5 - 35
    assert state.offer is None


def test_an_offer_stands_through_a_denial_until_it_is_replaced():
    game = make("negotiation")
    state = play(game, trade(), "[Offer: 2 Wood -> 1 Ore]", "[Deny]", "think again", "[accept]")
    assert state.holdings[0] == (10, 8, 10, 10, 11)
    state = play(game, trade(), "[Offer: 2 Wood -> 1 Ore]", "[Offer: 3 Ore -> 1 Wood]", "[accept]")
    assert state.holdings[0] == (10, 9, 10, 10, 13)


def test_accepting_ones_own_offer_takes_it_back():
    game = make("negotiation")
    state = play(game, trade(), "[Offer: 2 Wood -> 1 Ore]", "[Deny]", "[Accept]")
    assert state.offer is None
    assert state.holdings == trade().holdings


def test_one_move_can_accept_and_offer_with_what_was_just_won():
    game = make("negotiation")
    state = trade(holdings=((0, 0, 0, 0, 3), (10, 0, 0, 0, 0)))
    state = play(game, state, "[Offer: 3 Ore -> 1 Wheat]", "[Accept] [Offer: 3 Ore -> 1 Wheat]")
    assert state.holdings == ((1, 0, 0, 0, 0), (9, 0, 0, 0, 3))
    assert state.offer.proposer == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[Offer: 11 Ore -> 1 Wood]", "more than you hold"),
        ("[Offer: 1 Ore]", "one arrow"),
        ("[Offer: 1 Ore -> 1 Wood -> 2 Wheat]", "one arrow"),
        ("[Offer: 1 Gold -> 1 Wood]", "not a good"),
        ("[Offer: 0 Ore -> 1 Wood]", "at least 1"),
        ("[Offer: nothing -> 1 Wood]", "each side"),
    ],
)
def test_a_broken_offer_is_illegal(text, why):
    with pytest.raises(IllegalMove, match=why):
        make("negotiation").parse_action(trade(), text)


def test_accepting_what_one_cannot_pay_is_illegal():
    game = make("negotiation")
    state = play(game, trade(), "[Offer: 1 Ore -> 11 Wood]")
    with pytest.raises(IllegalMove, match="asks for more than you hold"):
        game.parse_action(state, "[Accept]")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.data())
def test_trading_neither_makes_nor_loses_goods(seed, data):
    game = make("negotiation")
    state = game.reset(seed)
    total = [a + b for a, b in zip(*state.holdings, strict=True)]
    while game.payoff(state) is None:
        give, want = data.draw(st.sampled_from(GOODS)), data.draw(st.sampled_from(GOODS))
        offer = f"[Offer: {data.draw(st.integers(1, 9))} {give} -> 2 {want}]"
        try:
            state = game.step(
                state, game.parse_action(state, data.draw(st.sampled_from([offer, "[Accept]"])))
            )
        except IllegalMove:
            state = game.step(state, game.parse_action(state, "[Deny]"))
        assert [a + b for a, b in zip(*state.holdings, strict=True)] == total
        assert min(*state.holdings[0], *state.holdings[1]) >= 0


def test_random_values_leave_the_plain_games_bounds():
    values = [v for seed in range(50) for v in make("negotiation").reset(seed).values]
    assert all(20 <= brick <= 30 for *_, brick, _ore in values)
    wild = [v for s in range(50) for v in make("negotiation-random-value").reset(s).values]
    assert any(brick < 20 or brick > 30 for *_, brick, _ore in wild)
    assert all(5 <= v <= 40 for row in wild for v in row)


def split(first=PLAIN, second=PLAIN, total=200):
    return Split((first, second), total)


def settle(first, second, *texts, **options):
    game = make("two-dollar", **options)
    return game.payoff(play(game, split(first, second), *texts))


def test_more_money_wins_and_equal_money_draws():
    assert settle(PLAIN, PLAIN, "[Propose] $1.01", "[Accept]").outcome == "player 0"
    assert settle(PLAIN, PLAIN, "[Propose] $0.99", "[Accept]").outcome == "player 1"
    assert settle(PLAIN, PLAIN, "[Propose] $1", "[Accept]").outcome == "draw"


@pytest.mark.parametrize(
    ("name", "enough", "short"),
    [
        ("quarter", 0.5, 0.49),
        ("two-fifths", 0.8, 0.79),
        ("half", 1.0, 0.99),
        ("two-thirds", 1.3, 1.29),
        ("four-fifths", 1.6, 1.59),
    ],
)
def test_a_share_below_the_brief_is_worth_nothing(name, enough, short):
    brief = BY_NAME[name]
    kept = settle(brief, BY_NAME["terse"], f"[Propose] ${enough}", "[Accept]")
    lost = settle(brief, BY_NAME["terse"], f"[Propose] ${short}", "[Accept]")
    assert f"${enough:.2f} and" in kept.reason
    assert "$0.00 and" in lost.reason
    assert lost.outcome == "player 1"


def test_no_deal_draws_after_the_last_move():
    assert settle(PLAIN, PLAIN, "[Propose] $2", "[Reject]", turns=2).outcome == "draw"


def test_a_rejected_proposal_cannot_be_accepted():
    game = make("two-dollar")
    state = play(game, split(), "[Propose] $2", "[Reject]")
    with pytest.raises(IllegalMove, match="no proposal"):
        game.parse_action(state, "[Accept]")


def test_a_deadline_is_met_by_accepting_in_the_first_half():
    late = ["[Propose] $0.50", "[Propose] $0.50"] * 5
    brief = BY_NAME["deadline"]
    assert settle(brief, PLAIN, "[Propose] $1.50", "[Accept]").outcome == "player 1"
    assert settle(brief, PLAIN, "[Propose] $1", "[Propose] $0.5", "[Accept]").outcome == "player 0"
    assert settle(brief, PLAIN, *late, "[Propose] $1", "[Propose] $0.5", "[Accept]").rewards[0] < 0


def test_the_terse_may_use_fifteen_words():
    game, state = make("two-dollar"), split(BY_NAME["terse"])
    game.parse_action(state, "word " * 15 + "[Propose] $1")
    with pytest.raises(IllegalMove, match="allow 15 words"):
        game.parse_action(state, "word " * 16 + "[Propose] $1")


def test_the_stubborn_may_give_up_exactly_one_cent():
    game = make("two-dollar")
    state = play(game, split(BY_NAME["stubborn"]), "[Propose] $1.51", "[Reject]")
    game.parse_action(state, "[Propose] $1.50")
    game.parse_action(state, "[Propose] $1.90")
    with pytest.raises(IllegalMove, match="give up 2 cents"):
        game.parse_action(state, "[Propose] $1.49")


@pytest.mark.parametrize(
    "text", ["[Propose] 1.20", "[Propose $1.20]", "[Propose] $2.01", "[Propose] $1.005", "hello"]
)
def test_a_proposal_that_names_no_amount_is_illegal(text):
    with pytest.raises(IllegalMove):
        make("two-dollar").parse_action(split(), text)


def test_two_actions_in_one_move_are_illegal():
    with pytest.raises(IllegalMove, match="exactly one"):
        make("two-dollar").parse_action(split(), "[Propose] $1 or [Accept]")


def test_the_sum_varies_only_in_its_variant():
    assert {make("two-dollar").reset(s).total for s in range(20)} == {200}
    totals = {make("two-dollar-variable-sum").reset(s).total for s in range(50)}
    assert len(totals) > 10
    assert all(100 <= t <= 500 for t in totals)
