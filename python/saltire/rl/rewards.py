"""Verifiable rewards: 1 for a right answer, 0 for any other, judged without a model.

A reward is any callable ``(completion, row) -> float``; ``row`` is the dataset's row, with the
fields that the reward names. Completions are hostile input: nothing is evaluated, only parsed.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from saltire.errors import SaltireError

Reward = Callable[[str, Mapping[str, Any]], float]

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")
_TOKEN = re.compile(r"\s*(\d+|[-+*/()])")
_MAX_ANSWER = 2000  # characters of a completion's end that are searched: an answer comes last


def parse_number(text: str) -> Fraction | None:
    """The value of ``1,234.5``, ``-3`` or ``1/2``; None if the text is not one number."""
    text = text.strip().rstrip(".").replace("$", "").replace("%", "").strip()
    if not _NUMBER.fullmatch(text) or len(text) > 40:
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        # "1.5/2" is a number to the pattern but not to Fraction; neither has an agreed value
        return None


def final_answer(completion: str) -> Fraction | None:
    r"""The number that a worked solution ends with.

    Looks for what follows the last ``####``, then inside the last ``\boxed{}``, then for the last
    number anywhere.
    """
    completion = completion[-_MAX_ANSWER:]
    for pattern in (r"####\s*(\S+)", r"\\boxed\{([^{}]*)\}"):
        marked = re.findall(pattern, completion)
        if marked:
            return parse_number(marked[-1])
    numbers = _NUMBER.findall(completion)
    return parse_number(numbers[-1]) if numbers else None


def number_reward(completion: str, row: Mapping[str, Any]) -> float:
    """1 if the completion's final answer equals ``row['answer']``, as exact fractions."""
    expected = final_answer(str(row["answer"]))
    return float(expected is not None and final_answer(completion) == expected)


def countdown_reward(completion: str, row: Mapping[str, Any]) -> float:
    """1 if the completion's expression uses each of ``row['numbers']`` once and gives ``target``.

    The expression is the last line's (or what ``<answer>`` encloses), up to an equals sign.
    """
    enclosed = re.findall(r"<answer>(.*?)</answer>", completion[-_MAX_ANSWER:], re.DOTALL)
    lines = completion[-_MAX_ANSWER:].strip().splitlines()
    text = enclosed[-1] if enclosed else (lines[-1] if lines else "")
    parsed = parse_expression(text.split("=")[0])
    if parsed is None:
        return 0.0
    value, used = parsed
    return float(value == row["target"] and sorted(used) == sorted(row["numbers"]))


def parse_expression(text: str) -> tuple[Fraction, list[int]] | None:
    """Value of a sum, difference, product or quotient of whole numbers, and the numbers in it.

    None if it is not one, or divides by zero. The usual precedence and brackets; no unary minus.
    """
    if len(text) > 200:
        return None
    tokens, position = [], 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            return None
        tokens.append(match.group(1))
        position = match.end()
    try:
        parser = _Parser(tokens)
        value = parser.sum()
    except (ValueError, ZeroDivisionError, IndexError):
        return None
    return (value, parser.used) if parser.place == len(tokens) else None


class _Parser:
    """Recursive descent; a text of 200 characters cannot nest deeper than 200."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.place = tokens, 0
        self.used: list[int] = []

    def sum(self) -> Fraction:
        value = self.product()
        while self._next() in ("+", "-"):
            sign = 1 if self._take() == "+" else -1
            value += sign * self.product()
        return value

    def product(self) -> Fraction:
        value = self.atom()
        while self._next() in ("*", "/"):
            value = value * self.atom() if self._take() == "*" else value / self.atom()
        return value

    def atom(self) -> Fraction:
        token = self._take()
        if token == "(":
            value = self.sum()
            if self._take() != ")":
                raise ValueError("an open bracket")
            return value
        self.used.append(int(token))  # ValueError for an operator
        return Fraction(self.used[-1])

    def _next(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def _take(self) -> str:
        self.place += 1
        return self.tokens[self.place - 1]


REWARDS: dict[str, Reward] = {"number": number_reward, "countdown": countdown_reward}


def find_reward(name: str) -> Reward:
    """A reward of this module by name, or your own as ``package.module:function``."""
    if name in REWARDS:
        return REWARDS[name]
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if function else None
    except (ImportError, AttributeError) as error:
        raise SaltireError(f"the reward {name!r} cannot be imported: {error}.") from error
    if not callable(found):
        raise SaltireError(
            f"there is no reward {name!r}; choose {', '.join(sorted(REWARDS))}, or name a function "
            "of your own as package.module:function."
        )
    return found
