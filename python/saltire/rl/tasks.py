"""Tasks: prompts with a verifiable reward, from a file or made on the spot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saltire.errors import SaltireError
from saltire.rl.rewards import (
    Reward,
    countdown_reward,
    find_reward,
    number_reward,
    parse_expression,
)

Row = Mapping[str, Any]

MAX_FILE_BYTES = 1 << 30  # a dataset of prompts; a larger file is a mistake or an attack


@dataclass(frozen=True)
class Task:
    """Rows, how each becomes a prompt, and how a completion is judged."""

    name: str
    rows: Sequence[Row]
    prompt: Callable[[Row], str]
    reward: Reward

    def __post_init__(self) -> None:
        if not self.rows:
            raise SaltireError(f"task {self.name}: it has no rows.")

    def split(self, held_out: int) -> tuple[Task, Task]:
        """The task without its last ``held_out`` rows, and those rows."""
        if not 0 < held_out < len(self.rows):
            raise SaltireError(
                f"task {self.name}: cannot hold out {held_out} of {len(self.rows)} rows; hold out "
                "at least 1 and leave at least 1."
            )
        train = Task(self.name, self.rows[:-held_out], self.prompt, self.reward)
        return train, Task(self.name, self.rows[-held_out:], self.prompt, self.reward)


def read_task(path: str | Path, reward: str = "number", limit: int | None = None) -> Task:
    """Questions and answers from a ``.jsonl`` file in the manner of gsm8k.

    Each line is an object with ``question`` (or ``prompt``) and, for the rewards of this package,
    ``answer``. Raises SaltireError with the line's number for a line that is not.
    """
    path = Path(path)
    if not path.is_file():
        raise SaltireError(f"there is no dataset {path}; give a .jsonl file of questions.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise SaltireError(f"{path} is above {MAX_FILE_BYTES >> 20} MiB; split it.")
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if limit is not None and len(rows) == limit:
            break
        if line.strip():
            rows.append(_checked_row(line, f"{path}, line {number}", reward))
    return Task(path.stem, rows, _question, find_reward(reward))


def _checked_row(line: str, where: str, reward: str) -> Row:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SaltireError(f"{where}: it is not JSON ({error}).") from error
    if not isinstance(row, dict) or not isinstance(row.get("question", row.get("prompt")), str):
        raise SaltireError(f"{where}: expected an object with a text 'question' or 'prompt'.")
    if reward == "number":
        answer = row.get("answer")
        if answer is None or number_reward(str(answer), row) != 1.0:
            raise SaltireError(
                f"{where}: 'answer' is {str(answer)[-60:]!r}; expected a text that ends in a "
                "number, such as '… #### 72'. Remove the line, or give it an answer."
            )
    return row


def _question(row: Row) -> str:
    return str(row.get("question", row.get("prompt")))


def arithmetic(count: int, digits: int = 2, seed: int = 0) -> Task:
    """Sums and differences of two whole numbers of up to ``digits`` digits: ``12+34=``."""
    if count < 1 or not 1 <= digits <= 9:
        raise SaltireError(
            f"arithmetic: {count} rows of {digits} digits; expected at least 1, of 1 to 9 digits."
        )
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    for _ in range(count):
        a, b = (int(n) for n in rng.integers(0, 10**digits, 2))
        sign = "+" if rng.random() < 0.5 else "-"
        rows.append({"question": f"{a}{sign}{b}=", "answer": a + b if sign == "+" else a - b})
    return Task("arithmetic", rows, _question, number_reward)


def countdown(
    count: int, numbers: int = 3, largest: int = 9, seed: int = 0, terse: bool = False
) -> Task:
    """Reach ``target`` with each number used once; every row has at least one solution.

    A row also holds one ``solution``, for supervised training. ``terse`` prompts are for models
    that know nothing else: ``3 4 5 17:``.
    """
    if count < 1 or not 2 <= numbers <= 6 or largest < 1:
        raise SaltireError(
            f"countdown: {count} rows of {numbers} numbers up to {largest}; expected at least 1 "
            "row, 2 to 6 numbers, and numbers of at least 1."
        )
    rng = np.random.default_rng(seed)
    rows: list[Row] = []
    while len(rows) < count:
        drawn = [int(n) for n in rng.integers(1, largest + 1, numbers)]
        signs = rng.choice(list("+-*"), numbers - 1)
        solution = str(drawn[0]) + "".join(
            f"{sign}{n}" for sign, n in zip(signs, drawn[1:], strict=True)
        )
        parsed = parse_expression(solution)
        assert parsed is not None
        if parsed[0] >= 0:
            shown = [int(n) for n in rng.permutation(drawn)]
            rows.append({"numbers": shown, "target": int(parsed[0]), "solution": solution})
    return Task("countdown", rows, _terse_countdown if terse else _countdown, countdown_reward)


def _terse_countdown(row: Row) -> str:
    return " ".join(map(str, row["numbers"])) + f" {row['target']}:"


def _countdown(row: Row) -> str:
    return (
        f"Use each of the numbers {', '.join(map(str, row['numbers']))} exactly once, with +, -, * "
        f"and brackets, to make {row['target']}. Work it out, then give the expression alone on "
        "the last line."
    )
