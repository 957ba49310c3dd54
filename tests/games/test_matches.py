"""Matches in flight: isolation, forfeits, replay, ratings."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from saltire.errors import SaltireError
from saltire.games import (
    FORMAT_PENALTY,
    GAMES,
    Fixture,
    MatchRecord,
    ScriptedAgent,
    make,
    play,
    rate,
    read_records,
    replay,
    round_robin,
    scripted,
    write_records,
)
from saltire.games.ratings import strengths, win_rates


def played(game, agents, fixtures, **options) -> list[MatchRecord]:
    by_name = {agent.name: agent for agent in agents}
    return sorted(play(game, by_name, fixtures, **options), key=lambda r: r.number)


def fixtures(names, count=6, seed=5) -> list[Fixture]:
    return [Fixture(n, seed + n, tuple(names)) for n in range(count)]


@pytest.mark.parametrize("name", sorted(GAMES))
def test_a_recorded_match_replays_to_the_same_end(name, tmp_path) -> None:
    game = make(name)
    seats = ["random"] * game.min_players
    records = played(game, [scripted("random")], fixtures(seats))
    write_records(tmp_path / "log.jsonl", records)
    again = read_records(tmp_path / "log.jsonl")
    assert again == records
    for record in again:
        replay(make(record.game, **record.options), record)


def test_matches_do_not_depend_on_how_many_are_in_flight() -> None:
    game, seats = make("undercover"), ["random"] * 5
    alone = played(game, [scripted("random")], fixtures(seats, 9), in_flight=1)
    together = played(game, [scripted("random")], fixtures(seats, 9), in_flight=7)
    assert alone == together


def test_a_replay_that_disagrees_is_named() -> None:
    game = make("boast")
    record = played(game, [scripted("random")], fixtures(["random"] * 2, 1))[0]
    with pytest.raises(SaltireError, match="played again it ends"):
        replay(game, replace(record, outcome="draw"))
    wrong = replace(record.turns[0], player=1)
    with pytest.raises(SaltireError, match="turn"):
        replay(game, replace(record, turns=(wrong, *record.turns[1:])))
    with pytest.raises(SaltireError, match="over before it"):
        replay(game, replace(record, turns=(*record.turns, record.turns[-1])))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no move"),
        ("<think>I wonder", "never closed"),
        ("blah " * 1000, "characters"),
        ("nonsense", "exactly one"),
    ],
    ids=["empty", "unclosed", "endless", "illegal"],
)
def test_a_reply_that_is_no_move_forfeits(text, why) -> None:
    bad = ScriptedAgent("bad", lambda ask: text)
    records = played(make("two-dollar"), [bad, scripted("first")], fixtures(["first", "bad"]))
    for record in records:
        assert record.rewards == (0.0, FORMAT_PENALTY)
        assert record.forfeits == (1,)
        assert record.outcome == "player 0"
        assert why in record.turns[-1].refused
        assert record.turns[-1].final
        replay(make("two-dollar"), record)


def test_an_agent_with_retries_is_told_why_and_asked_again() -> None:
    heard: list[str] = []

    def learns(ask) -> str:
        heard.append(ask.refused)
        return ask.legal[0] if ask.refused else "nonsense"

    agent = ScriptedAgent("learns", learns, retries=1)
    record = played(make("boast"), [agent], fixtures(["learns"] * 2, 1))[0]
    assert not record.forfeits
    assert any("[pass]" in reason for reason in heard)
    replay(make("boast"), record)


def test_a_crash_in_one_match_leaves_the_others_alone() -> None:
    def breaks(ask) -> str:
        if ask.match == 2:
            raise ZeroDivisionError("oops")
        return ask.legal[0]

    agent = ScriptedAgent("breaks", breaks)
    records = played(make("boast"), [agent], fixtures(["breaks"] * 2))
    assert [bool(record.error) for record in records] == [False, False, True, False, False, False]
    assert "ZeroDivisionError: oops" in records[2].error
    assert records[2].outcome == ""


def test_a_crash_of_the_rules_ends_its_match_alone(monkeypatch) -> None:
    game = make("boast")
    step = type(game).step

    def breaks(self, state, move):
        if state.beasts == game.reset(6).beasts:
            raise RuntimeError("bad rule")
        return step(self, state, move)

    monkeypatch.setattr(type(game), "step", breaks)
    records = played(game, [scripted("random")], fixtures(["random"] * 2, 8))
    same_deal = [game.reset(5 + n).beasts == game.reset(6).beasts for n in range(8)]
    assert [bool(record.error) for record in records] == same_deal
    assert not all(same_deal)


def test_an_agent_that_breaks_as_a_whole_loses_only_its_matches() -> None:
    class Broken(ScriptedAgent):
        def advance(self):
            super().advance()
            raise MemoryError("no room")

    broken = Broken("broken", lambda ask: "")
    seats = [Fixture(n, n, ("random", "broken" if n == 1 else "random")) for n in range(3)]
    records = played(make("boast"), [scripted("random"), broken], seats)
    assert [bool(record.error) for record in records] == [False, True, False]
    assert "no room" in records[1].error


def test_a_match_without_an_end_is_stopped() -> None:
    record = played(
        make("dont-say-it", turns=500),
        [scripted("first")],
        fixtures(["first"] * 2, 1),
        most_replies=20,
    )[0]
    assert "no end after 20" in record.error


def test_wrong_seats_are_refused() -> None:
    game = make("boast")
    with pytest.raises(SaltireError, match="2 players; 3 were given"):
        played(game, [scripted("random")], fixtures(["random"] * 3))
    with pytest.raises(SaltireError, match="no agent"):
        played(game, [scripted("random")], fixtures(["random", "nobody"]))
    with pytest.raises(SaltireError, match="random"):
        scripted("randm")


def test_a_log_cut_by_a_kill_reads_and_other_damage_is_named(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    records = played(make("boast"), [scripted("random")], fixtures(["random"] * 2, 2))
    write_records(path, records)
    path.write_text(path.read_text() + '{"format": 1, "num')
    assert read_records(path) == records
    path.write_text('{"format": 1}\n')
    with pytest.raises(SaltireError, match="line 1"):
        read_records(path)
    path.write_text("nonsense\n" + json.dumps(records[0].to_dict()) + "\n")
    with pytest.raises(SaltireError, match="line 1 is not JSON"):
        read_records(path)


def test_a_better_agent_is_rated_above_a_worse_one() -> None:
    agents = [scripted(name) for name in ("last", "random", "first")]
    records = played(make("boast"), agents, round_robin(["last", "random", "first"], 30, 0))
    ratings = rate(records, 0.9, resamples=200)
    assert [rating.agent for rating in ratings] == ["last", "random", "first"]
    assert sum(rating.elo for rating in ratings) == pytest.approx(0, abs=1e-6)
    for rating in ratings:
        assert rating.win_rate_interval[0] <= rating.win_rate <= rating.win_rate_interval[1]
        assert rating.elo_interval[0] <= rating.elo <= rating.elo_interval[1]
        assert rating.wins + rating.draws + rating.losses == 120
    assert ratings[0].elo_interval[0] > ratings[2].elo_interval[1]


def test_two_agents_strengths_follow_their_odds() -> None:
    """With n = 300 wins against 100, the maximum of the likelihood is at their odds, 3 to 1."""
    import numpy as np

    table = np.zeros((1, 3, 2, 2))
    table[0, 0, 0, 1], table[0, 2, 1, 0] = 300, 300
    table[0, 2, 0, 1], table[0, 0, 1, 0] = 100, 100
    elo = strengths(table)[0]
    assert elo[0] - elo[1] == pytest.approx(400 * np.log10(300.25 / 100.25), rel=1e-6)
    assert win_rates(table)[0] == pytest.approx([0.75, 0.25])


def test_crashed_matches_are_not_rated() -> None:
    broken = ScriptedAgent("broken", lambda ask: 1 // 0)  # type: ignore[arg-type, return-value]
    records = played(make("boast"), [broken, scripted("random")], fixtures(["random", "broken"]))
    with pytest.raises(SaltireError, match="nothing to rate"):
        rate(records)


def test_a_round_robin_plays_each_deal_from_both_sides() -> None:
    games = round_robin(["a", "b", "c"], 2, 7)
    assert len(games) == 2 * 3 * 2
    assert len({game.number for game in games}) == len(games)
    for a, b in (("a", "b"), ("b", "c"), ("a", "c")):
        for deal in (7, 8):
            seats = {game.agents for game in games if game.seed == deal}
            assert {(a, b), (b, a)} <= seats
    with pytest.raises(SaltireError, match="two or more"):
        round_robin(["a"], 2, 7)
    assert all(len(game.agents) == 4 for game in round_robin(["a", "b"], 1, 0, players=4))
