"""saltire play and saltire tournament: what they print, and what they refuse."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from saltire.cli import build_app
from saltire.errors import SaltireError

runner = CliRunner()


def output(*arguments: str, input: str | None = None) -> str:
    result = runner.invoke(build_app(), list(arguments), input=input)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


def refusal(*arguments: str) -> str:
    result = runner.invoke(build_app(), list(arguments))
    assert isinstance(result.exception, SaltireError), result.output + repr(result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_play_shows_the_match_and_writes_a_log_that_replays(tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    shown = output(
        "play", "two-dollar", "--agents", "random,first", "--seed", "3", "--out", str(log)
    )
    assert "player 0: random" in shown
    assert "Your secret instructions" in shown
    assert shown.count("[Propose]") >= 2  # the brackets of moves are not markup
    again = output("play", "--replay", str(log))
    assert "same end" in again
    assert "[Propose]" in again
    line = json.loads(log.read_text())
    line["outcome"] = "draw" if line["outcome"] != "draw" else "player 0"
    log.write_text(json.dumps(line) + "\n")
    assert "played again" in refusal("play", "--replay", str(log))
    assert "no match 7" in refusal("play", "--replay", str(log), "--match", "7")


def test_play_json_holds_whole_records() -> None:
    text = output("play", "boast", "--agents", "random", "--matches", "4", "--json")
    matches = json.loads(text.splitlines()[-1])["matches"]
    assert [match["number"] for match in matches] == [0, 1, 2, 3]
    assert matches[0]["seed"] == matches[1]["seed"] != matches[2]["seed"]
    assert all(match["outcome"] for match in matches)


def test_seats_change_between_the_two_matches_of_a_deal() -> None:
    text = output("play", "boast", "--agents", "random,last", "--matches", "2", "--json")
    first, second = json.loads(text.splitlines()[-1])["matches"]
    assert first["agents"] == ["random", "last"]
    assert second["agents"] == ["last", "random"]


def test_a_person_plays_and_may_mistype() -> None:
    shown = output("play", "boast", "--agents", "human,first", input="bluff\n[boast]\n[doubt]\n")
    assert "is asked again" in shown
    assert "[boast]" in shown
    assert "forfeits" not in shown


def test_tournament_rates(tmp_path) -> None:
    log = tmp_path / "log.jsonl"
    arguments = ("tournament", "boast", "--agents", "last,first", "--deals", "10")
    facts = json.loads(output(*arguments, "--json", "--out", str(log)).splitlines()[-1])
    assert facts["matches"] == 20
    assert facts["ratings"][0]["agent"] == "last"
    assert len(log.read_text().splitlines()) == 20
    assert "won-drawn-lost" in output(*arguments)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("play", "two-dolar"), "two-dollar"),
        (("play", "boast", "--agents", "rendom"), "random"),
        (("play", "boast", "--agents", "random,random,random"), "2 players; 3"),
        (("play", "boast", "--agents", ","), "nobody"),
        (("play", "boast", "--set", "turns=3"), "talk"),
        (("play", "two-dollar", "--set", "turns=no"), "turns"),
        (("play", "two-dollar", "--set", "turns"), "name=value"),
        (("play", "boast", "--agents", "silent", "--matches", "0"), "matches"),
        (("play", "boast", "--engine", "warp"), "decoder"),
        (("play", "--replay", "nowhere.jsonl"), "nowhere"),
        (("play",), "name a game"),
        (("tournament", "boast", "--agents", "random"), "two or more"),
        (("tournament", "boast", "--agents", "random,human"), "human"),
        (("tournament", "boast", "--agents", "random,first", "--level", "2"), "level"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(arguments, told) -> None:
    assert told in refusal(*arguments)
