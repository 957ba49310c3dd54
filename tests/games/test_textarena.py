"""TextArena's real package: its environments as games, our agents in its loops, rules alike."""

from __future__ import annotations

import random
import urllib.request

import numpy as np
import pytest

from saltire.errors import SaltireError
from saltire.games import (
    FORMAT_PENALTY,
    Fixture,
    ScriptedAgent,
    make,
    play,
    replay,
    scripted,
)
from saltire.games.textarena import environments, textarena_agent
from tests.games.record_textarena import (
    OFFERS,
    RECORDED,
    record_matches,
    recorded_matches,
    words_of_our_own,
)

ta = pytest.importorskip("textarena")
NEGOTIATION = "textarena:SimpleNegotiation-v0"


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


def test_environments_that_download_are_refused_with_the_command(monkeypatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "path", [])
    kept = nltk.download
    with pytest.raises(SaltireError, match=r"nltk\.downloader words"):
        make("textarena:DontSayIt-v0")
    assert nltk.download is kept


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_matches_are_textarenas_own(name) -> None:
    """So that what test_recorded_matches compares our rules with is true of this TextArena too."""
    assert record_matches(name) == recorded_matches(name)


def test_dont_say_it_downloads_nothing_where_its_words_are_there(monkeypatch) -> None:
    def online(*_: object, **__: object) -> None:
        raise AssertionError("it asked the network")

    monkeypatch.setattr(urllib.request, "urlopen", online)
    with words_of_our_own():
        game = make("textarena:DontSayIt-v0")
        state = game.step(game.reset(0), "Hello.")
    assert game.turn(state) == 1
