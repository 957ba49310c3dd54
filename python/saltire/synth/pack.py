"""Documents in order to one text with its boundaries, and those boundaries as attention masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saltire.errors import SaltireError


@dataclass(frozen=True)
class Separator:
    """Text between two documents and its tokens; closes: it also follows the last one."""

    text: str
    tokens: int
    closes: bool = False


@dataclass(frozen=True)
class PackedText:
    """text; starts, ends: characters of each document in it; token_starts, token_ends: its tokens,
    documents tokenised one by one; tokens: of all, separators included."""

    text: str
    tokens: int
    starts: list[int]
    ends: list[int]
    token_starts: list[int]
    token_ends: list[int]


def make_separator(name: str, tokenizer: Any) -> Separator:
    """``blank``, ``raw``, ``eos`` or ``text:...``; SaltireError if the tokenizer has no EOS."""
    if name == "raw":
        return Separator("", 0)
    if name == "eos":
        if tokenizer.eos_token is None:
            raise SaltireError(
                "the tokenizer has no end-of-text token, which --separator eos needs. "
                "Use --separator blank, raw or text:..."
            )
        return Separator(tokenizer.eos_token, 1, closes=True)
    text = "\n\n" if name == "blank" else name.removeprefix("text:")
    return Separator(text, len(tokenizer(text, add_special_tokens=False)["input_ids"]))


def pack(texts: Sequence[str], tokens: Sequence[int], separator: Separator) -> PackedText:
    """Join texts; tokens: of each."""
    pieces: list[str] = []
    starts, ends, token_starts, token_ends = [], [], [], []
    at = token_at = 0
    for k, (text, count) in enumerate(zip(texts, tokens, strict=True)):
        starts.append(at)
        token_starts.append(token_at)
        pieces.append(text)
        at, token_at = at + len(text), token_at + count
        ends.append(at)
        token_ends.append(token_at)
        if k + 1 < len(texts) or separator.closes:
            pieces.append(separator.text)
            at, token_at = at + len(separator.text), token_at + separator.tokens
    return PackedText("".join(pieces), token_at, starts, ends, token_starts, token_ends)


def position_ids(token_starts: Sequence[int], tokens: int) -> Tensor:
    """Positions that restart at each document, a separator counting to the one before it.

    Returns int64 [tokens].
    """
    starts = torch.tensor([*token_starts, tokens])
    return torch.arange(tokens) - torch.repeat_interleave(starts[:-1], starts.diff())


def cu_seqlens(token_starts: Sequence[int], tokens: int) -> Tensor:
    """Bounds of the documents as variable-length attention wants them: int32 [documents + 1]."""
    return torch.tensor([*token_starts, tokens], dtype=torch.int32)


def document_mask(token_starts: Sequence[int], tokens: int) -> Tensor:
    """True where a token may look: causal and within its document. bool [tokens, tokens]."""
    starts = torch.tensor([*token_starts, tokens])
    document = torch.repeat_interleave(torch.arange(len(token_starts)), starts.diff())
    return (document[:, None] == document[None, :]).tril()
