"""Matches of TextArena's originals, recorded: python -m tests.games.record_textarena

Each is what was dealt, the replies, and how TextArena ended it. The files in ``recorded`` hold what
this gave with TextArena 0.7.4; tests compare our games with the files, and the files with the
TextArena that is installed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

FOLDER = Path(__file__).parent / "recorded"

OFFERS = [
    "[Offer: 2 Wood -> 1 Ore]",
    "[Offer: 1 Ore, 3 Wheat -> 2 Brick]",
    "[Offer: 1 Brick -> 4 Sheep]",
]

# Our briefs, and TextArena's roles with the same rule.
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

WORDS = ["apple", "boat", "garden", "river", "stone", "table", "window"]


def ended(env: Any, replies: Iterator[str]) -> dict[str, Any]:
    """Play the replies until TextArena ends the match. It asks again after an invalid move, and
    gets the same reply again."""
    used: list[str] = []
    for reply in replies:
        used.append(reply)
        player, done = env.state.current_player_id, False
        while not done and env.state.current_player_id == player:
            done, _ = env.step(action=reply)
        if done:
            rewards, info = env.close()
            return {
                "replies": used,
                "rewards": [float(rewards[p]) for p in (0, 1)],
                "invalid": [p for p in (0, 1) if info[p]["invalid_move"]],
            }
    raise AssertionError("TextArena did not end the match")


def negotiation(seed: int) -> dict[str, Any]:
    """With wild replies in a quarter of the matches. Not in the last turn: there TextArena lets the
    goods decide after an invalid move."""
    import textarena as ta

    rng = Random(seed)
    env = ta.make("SimpleNegotiation-v0")
    env.reset(num_players=2, seed=seed)
    held, worth = (env.state.game_state[f"player_{what}"] for what in ("resources", "values"))
    calm = ["[Accept]", "[Deny]", "Well.", *OFFERS, *OFFERS]
    wild = ["[Offer: 99 Ore -> 1 Wood]", "[Offer: rubbish]", "[Offer: 2 Gold -> 1 Ore]"]
    choices = [calm + wild if seed % 4 == 0 and n < 9 else calm for n in range(12)]
    return {
        "seed": seed,
        "holdings": [list(held[p].values()) for p in (0, 1)],
        "values": [list(worth[p].values()) for p in (0, 1)],
        **ended(env, iter([rng.choice(some) for some in choices])),
    }


def two_dollar(seed: int) -> dict[str, Any]:
    """In steps of half a dollar: where TextArena compares floats, these are exact."""
    import textarena as ta

    rng = Random(seed)
    names = rng.sample(sorted(TWINS), 2)
    env = ta.make("TwoDollar-v0", player_roles=[TWINS[name] for name in names])
    env.reset(num_players=2, seed=seed)
    amounts = [f"[Propose] ${n / 2:.2f}" for n in range(5)]
    calm = ["[Reject]", "[Accept]", *rng.choices(amounts, k=4)]
    wild = ["[Propose] $3.00", "nothing", "[Accept] [Reject]", "word " * 20 + "[Propose] $1.00"]
    choices = calm + wild if seed % 5 == 0 else calm
    replies = (rng.choice(choices if n else amounts) for n in itertools.count())
    return {"seed": seed, "briefs": names, **ended(env, replies)}


def dont_say_it(seed: int) -> dict[str, Any]:
    """Needs :func:`words_of_our_own`."""
    import textarena as ta

    rng = Random(seed)
    env = ta.make("DontSayIt-v0")
    env.reset(num_players=2, seed=seed)
    secret = env.state.game_state["target_words"]
    kinds = ["Hello.", "Nice.", "a {}S", "No."][: 2 + seed % 3]
    replies = (rng.choice(kinds).format(rng.choice(WORDS)) for _ in itertools.count())
    return {"seed": seed, "words": [secret[p] for p in (0, 1)], **ended(env, replies)}


@functools.cache
def _word_data() -> tempfile.TemporaryDirectory[str]:
    """NLTK's data as DontSayIt reads it: a few words that are all nouns. NLTK remembers where it
    read from, so a process has one folder."""
    folder = tempfile.TemporaryDirectory()
    corpus = Path(folder.name) / "corpora" / "words"
    corpus.mkdir(parents=True)
    for name in ("en", "en-basic"):
        (corpus / name).write_text("\n".join(WORDS) + "\n")
    tagger = Path(folder.name) / "taggers" / "averaged_perceptron_tagger_eng"
    tagger.mkdir(parents=True)
    parts = {"weights": {}, "tagdict": dict.fromkeys(WORDS, "NN"), "classes": ["NN"]}
    for part, value in parts.items():
        (tagger / f"averaged_perceptron_tagger_eng.{part}.json").write_text(json.dumps(value))
    return folder


@contextlib.contextmanager
def words_of_our_own() -> Iterator[None]:
    """NLTK reads them, and downloads nothing."""
    import nltk

    paths, download = nltk.data.path, nltk.download
    nltk.data.path, nltk.download = [_word_data().name], lambda *_, **__: True
    nltk.data.clear_cache()
    try:
        yield
    finally:
        nltk.data.path, nltk.download = paths, download
        nltk.data.clear_cache()


RECORDED: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {
    "negotiation": (negotiation, 60),
    "two-dollar": (two_dollar, 100),
    "dont-say-it": (dont_say_it, 24),
}


def record_matches(name: str) -> list[dict[str, Any]]:
    """All matches of one game, as TextArena ends them now."""
    make, count = RECORDED[name]
    with words_of_our_own():
        return [make(seed) for seed in range(count)]


def recorded_matches(name: str) -> list[dict[str, Any]]:
    """The file of one game."""
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    for game in RECORDED:
        lines = [json.dumps(match) + "\n" for match in record_matches(game)]
        (FOLDER / f"{game}.jsonl").write_text("".join(lines))
