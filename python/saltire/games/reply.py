"""Think, then act: what an agent writes, and the part of it that the others see."""

from __future__ import annotations

import re

from saltire.games.game import IllegalMove

THINK_THEN_ACT = (
    "First think between <think> and </think>; nobody else sees that. "
    "Whatever you write after </think> is your move."
)

# A move longer than this is an agent that does not stop; real messages are far below it.
LONGEST_MOVE = 2000

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def split_reply(text: str, longest: int = LONGEST_MOVE) -> tuple[str, str]:
    """The thought and the move of a reply; a reply without tags is all move.

    Raises IllegalMove for a thought that is never closed, an empty move and an endless one.
    """
    head, tag, tail = text.rpartition("</think>")
    if not tag and "<think>" in text:
        raise IllegalMove("the thought was opened with <think> and never closed with </think>")
    thought, move = head.replace("<think>", "", 1).strip(), tail.strip()
    if not move:
        raise IllegalMove("the reply holds no move")
    if len(move) > longest:
        raise IllegalMove(f"the move has {len(move)} characters; at most {longest} are allowed")
    return thought, move


def one_line(text: str) -> str:
    """``text`` on one line without control characters.

    Other players' words go into prompts and terminals: a line break could pass for a line of the
    game, an escape sequence for a command of the terminal.
    """
    return " ".join(_CONTROL.sub(" ", text).split())
