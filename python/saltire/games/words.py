"""Saltire's own word lists, read once from the package's data."""

from __future__ import annotations

from functools import cache
from importlib import resources


@cache
def plain_nouns() -> tuple[str, ...]:
    """Everyday nouns, lower case, no two alike."""
    return tuple(_read("words_plain.txt").split())


@cache
def hard_nouns() -> tuple[str, ...]:
    """Nouns that are harder to slip into a conversation; none of them is a plain one."""
    return tuple(_read("words_hard.txt").split())


@cache
def word_pairs() -> tuple[tuple[str, str], ...]:
    """Pairs of related words that share most descriptions, for Undercover."""
    lines = (line.split() for line in _read("word_pairs.txt").splitlines() if line.strip())
    return tuple((first, second) for first, second in lines)


def _read(name: str) -> str:
    return (
        resources.files("saltire.games").joinpath("data").joinpath(name).read_text(encoding="utf-8")
    )
