"""TextArena's real package: its environments as games, our agents in its loops, rules alike."""

from __future__ import annotations

import json
import random
from pathlib import Path
from random import Random

import numpy as np
import pytest

from saltire.errors import SaltireError
from saltire.games import (
    FORMAT_PENALTY,
    Fixture,
    IllegalMove,
    ScriptedAgent,
    make,
    play,
    replay,
    scripted,
)
from saltire.games.textarena import environments, textarena_agent
from saltire.games.two_dollar import Split
from saltire.games.two_dollar_briefs import BRIEFS

ta = pytest.importorskip("textarena")
NEGOTIATION, DOLLAR = "textarena:SimpleNegotiation-v0", "textarena:TwoDollar-v0"

OFFERS = [
    "[Offer: 2 Wood -> 1 Ore]",
    "[Offer: 1 Ore, 3 Wheat -> 2 Brick]",
    "[Offer: 1 Brick -> 4 Sheep]",
]


def bids(ask) -> str:
    """A reply for a negotiation that depends on nothing but the question."""
    return ask.random().choice(["[Deny] No.", "[Accept] Fine.", *OFFERS, "Let me think."])


def test_any_environment_is_a_game_that_seeds_replay() -> None:
    game = make(NEGOTIATION)
    agents = {"bids": ScriptedAgent("bids", bids)}
    games = [Fixture(n, n // 2, ("bids", "bids")) for n in range(8)]
    together = {r.number: r for r in play(game, agents, games, in_flight=8)}
    alone = {r.number: r for r in play(game, agents, games, in_flight=1)}
    assert together == alone
    assert not any(record.error for record in alone.values())
    for record in alone.values():
        replay(make(record.game, **record.options), record)


def test_a_state_can_be_gone_back_to() -> None:
    game = make(NEGOTIATION)
    first = game.reset(4)
    second = game.step(first, OFFERS[0])
    third = game.step(second, "[Accept]")
    before = game.observe(second, 1)
    other = game.step(second, "[Deny]")
    assert game.observe(second, 1) == before
    assert game.observe(third, 0) != game.observe(other, 0)
    assert game.turn(first) == 0


def test_global_random_numbers_are_left_alone() -> None:
    random.seed(11)
    np.random.seed(11)
    expected = random.random(), np.random.random()
    random.seed(11)
    np.random.seed(11)
    game = make(NEGOTIATION)
    state = game.reset(3)
    game.observe(game.step(state, OFFERS[0]), 1)
    assert (random.random(), np.random.random()) == expected
    random.seed(99)
    assert game.observe(game.reset(3), 0) == game.observe(state, 0)


@pytest.mark.parametrize(
    ("name", "players"), [("textarena:KuhnPoker-v0", 2), ("textarena:SecretMafia-v0", 6)]
)
def test_the_number_of_players_is_found(name, players) -> None:
    game = make(name)
    assert game.min_players == players == len(game.roles)
    assert game.options()["players"] == players
    with pytest.raises(SaltireError, match="players"):
        game.reset(0, players + 1)


def test_one_player_games_play() -> None:
    game = make("textarena:GuessTheNumber-v0")
    guess = ScriptedAgent("guess", lambda ask: f"[{ask.turn + 1}]")
    record = next(iter(play(game, {"guess": guess}, [Fixture(0, 1, ("guess",))])))
    assert not record.error, record.error
    assert record.outcome in game.outcomes


def test_a_move_that_textarena_ends_the_match_for_costs_the_penalty() -> None:
    agents = {
        "bad": ScriptedAgent("bad", lambda ask: "[Offer: nothing]"),
        "bids": scripted("first"),
    }
    record = next(iter(play(make(NEGOTIATION), agents, [Fixture(0, 1, ("bad", "bids"))])))
    assert record.rewards == (FORMAT_PENALTY, 0.0)
    assert record.outcome == "player 1"
    assert len(record.turns) == 2  # TextArena asks again once


def test_an_empty_reply_forfeits() -> None:
    agents = {"silent": scripted("silent"), "bids": ScriptedAgent("bids", bids)}
    record = next(iter(play(make(NEGOTIATION), agents, [Fixture(0, 1, ("bids", "silent"))])))
    assert record.rewards == (0.0, FORMAT_PENALTY)


def test_unknown_environments_are_refused_with_the_nearest() -> None:
    with pytest.raises(SaltireError, match="textarena:SimpleNegotiation-v0"):
        make("textarena:SimpleNegotation-v0")
    assert len(environments()) > 100


def test_our_agent_plays_in_textarenas_own_loop() -> None:
    env = ta.make("SimpleNegotiation-v0")
    env.reset(num_players=2, seed=3)
    thinks = ScriptedAgent("thinks", lambda ask: f"<think>hm</think>{bids(ask)}")
    agents = [textarena_agent(thinks, seed=p) for p in (0, 1)]
    assert all(isinstance(agent, ta.Agent) for agent in agents)
    done = False
    while not done:
        player, observation = env.get_observation()
        move = agents[player](observation)
        assert "hm" not in move
        done, _ = env.step(action=move)
    assert set(env.close()[0]) == {0, 1}
    broken = textarena_agent(ScriptedAgent("broken", lambda ask: str(1 // 0)))
    with pytest.raises(SaltireError, match="ZeroDivisionError"):
        broken("hello")


# --- the same rules ---------------------------------------------------------------------------


def same_end(game, state, env, replies: list[str]) -> tuple[str, bool]:
    """Play replies in both until they end; TextArena is asked again as often as it wants to.

    Returns the outcome's label, the same in both, and whether a forfeit made it.
    """
    for reply in replies:
        try:
            move = game.parse_action(state, reply)
        except IllegalMove:
            state = game.forfeit(state, "")
        else:
            state = game.step(state, move)
        done = False
        for _ in range(8):
            player = env.state.current_player_id
            done, _ = env.step(action=reply)
            if done or env.state.current_player_id != player:
                break
        payoff = game.payoff(state)
        assert (payoff is not None) == done, (reply, payoff)
        if payoff is not None:
            rewards, info = env.close()
            label = "draw" if rewards[0] == rewards[1] else f"player {int(rewards[1] > rewards[0])}"
            assert payoff.outcome == label, replies
            assert bool(payoff.forfeits) == any(info[p]["invalid_move"] for p in (0, 1))
            return label, bool(payoff.forfeits)
    raise AssertionError("neither ended")


def test_negotiation_deals_and_ends_as_textarena_does() -> None:
    """The same seed deals the same goods and values, and the same replies end the same way."""
    game, found = make("negotiation"), set()
    for seed in range(60):
        rng = Random(seed)
        env = ta.make("SimpleNegotiation-v0")
        env.reset(num_players=2, seed=seed)
        state = game.reset(seed)
        held = env.state.game_state["player_resources"]
        assert [tuple(held[p].values()) for p in (0, 1)] == list(state.holdings)
        worth = env.state.game_state["player_values"]
        assert [tuple(worth[p].values()) for p in (0, 1)] == list(state.values)
        calm = ["[Accept]", "[Deny]", "Well.", *OFFERS, *OFFERS]
        wild = ["[Offer: 99 Ore -> 1 Wood]", "[Offer: rubbish]", "[Offer: 2 Gold -> 1 Ore]"]
        # Not in the last turn: there TextArena lets the goods decide after an invalid move.
        choices = [calm + wild if seed % 4 == 0 and n < 9 else calm for n in range(12)]
        found.add(same_end(game, state, env, [rng.choice(some) for some in choices]))
    assert {("player 0", False), ("player 1", False), ("draw", False)} <= found
    assert any(forfeit for _, forfeit in found)


TWINS = {
    "quarter": "50_cents",
    "two-fifths": "80_cents",
    "half": "1_dollar",
    "two-thirds": "1_30_dollar",
    "four-fifths": "1_60_dollar",
    "terse": "say_little",
    "stubborn": "high_tension",
    "deadline": "x_rounds",
    "plain": "vanilla",
}


def test_two_dollar_ends_as_textarena_does() -> None:
    game, found = make("two-dollar"), set()
    briefs = {brief.name: brief for brief in BRIEFS}
    for seed in range(100):
        rng = Random(seed)
        names = rng.sample(sorted(TWINS), 2)
        env = ta.make("TwoDollar-v0", player_roles=[TWINS[name] for name in names])
        env.reset(num_players=2, seed=seed)
        state = Split((briefs[names[0]], briefs[names[1]]), 200)
        # Steps of half a dollar: where TextArena compares floats, these are exact.
        amounts = [f"[Propose] ${n / 2:.2f}" for n in range(5)]
        calm = ["[Reject]", "[Accept]", *rng.choices(amounts, k=4)]
        wild = ["[Propose] $3.00", "nothing", "[Accept] [Reject]", "word " * 20 + "[Propose] $1.00"]
        choices = calm + wild if seed % 5 == 0 else calm
        replies = [rng.choice(choices if n else amounts) for n in range(60)]
        found.add(same_end(game, state, env, replies))
    assert {("player 0", False), ("player 1", False), ("draw", False)} <= found
    assert any(forfeit for _, forfeit in found)


def test_environments_that_download_are_refused_with_the_command(monkeypatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    kept = nltk.download
    with pytest.raises(SaltireError, match=r"nltk\.downloader words"):
        make("textarena:DontSayIt-v0")
    assert nltk.download is kept


@pytest.fixture
def word_data(tmp_path: Path, monkeypatch) -> list[str]:
    """NLTK's data as DontSayIt reads it, with a few words of our own that are all nouns."""
    nltk = pytest.importorskip("nltk")
    words = ["apple", "boat", "garden", "river", "stone", "table", "window"]
    corpus = tmp_path / "corpora" / "words"
    corpus.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (corpus / name).write_text("\n".join(words) + "\n")
    tagger = tmp_path / "taggers" / "averaged_perceptron_tagger_eng"
    tagger.mkdir(parents=True)
    parts = {"weights": {}, "tagdict": dict.fromkeys(words, "NN"), "classes": ["NN"]}
    for part, value in parts.items():
        (tagger / f"averaged_perceptron_tagger_eng.{part}.json").write_text(json.dumps(value))
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    nltk.data.clear_cache()
    return words


def test_dont_say_it_ends_as_textarena_does_and_downloads_nothing(word_data, monkeypatch) -> None:
    import urllib.request

    def online(*_: object, **__: object) -> None:
        raise AssertionError("it asked the network")

    monkeypatch.setattr(urllib.request, "urlopen", online)
    theirs, ours, found = make("textarena:DontSayIt-v0"), make("dont-say-it"), set()
    for seed in range(12):
        rng = Random(seed)
        there = theirs.reset(seed)
        secret = there.table.env.state.game_state["target_words"]
        here = ours.reset(seed)
        object.__setattr__(here, "words", (secret[0], secret[1]))
        for _ in range(30):
            reply = rng.choice(
                ["Hello.", "Nice.", f"a {rng.choice(word_data)}S", "No."][: 2 + seed % 3]
            )
            there, here = theirs.step(there, reply), ours.step(here, reply)
            ends = theirs.payoff(there), ours.payoff(here)
            assert (ends[0] is None) == (ends[1] is None)
            if ends[0] is not None and ends[1] is not None:
                assert ends[0].outcome == ends[1].outcome
                found.add(ends[0].outcome)
                break
    assert found == {"player 0", "player 1", "draw"}
