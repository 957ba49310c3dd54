"""Warped distributions, draws, and exact speculative acceptance (room ``csrc/speculate``)."""

from __future__ import annotations

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import library  # noqa: F401  (loads the compiled ops)


def warp_logits(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Probabilities after temperature, top-k, top-p and min-p, in transformers' order.

    logits: f32 [M, V]; -inf masks a token. temperature > 0. top_k: 0 keeps all; ties with the k-th
    stay. top_p: the fewest largest tokens whose mass is top_p or more. min_p: a share of the
    largest probability. Returns f32 [M, V], rows summing to 1. Raises SaltireError for a row
    without a finite largest logit, and for settings out of range.
    """
    try:
        p = torch.ops.saltire.warp_logits(logits, temperature, top_k, top_p, min_p)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    if _may_look(p):
        for row in p[:, 0].isnan().nonzero().flatten()[:1].tolist():
            raise SaltireError(
                f"warp_logits: row {row} of logits is all -inf or holds inf or NaN; there is no "
                "token to draw. Check the mask and the model."
            )
    return p


def draw_tokens(
    p: Tensor, sequences: Tensor, positions: Tensor, seed: int, draft: bool = False
) -> Tensor:
    """One token from each row of p: f32 [M, V] -> int64 [M].

    sequences, positions: int64 [M]; with seed and draft they alone decide the random number
    (Philox4x32-10), so a draw depends neither on the batch nor on earlier draws.
    """
    try:
        return torch.ops.saltire.draw_tokens(p, sequences, positions, seed, draft)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


def speculate_verify(
    p: Tensor,
    q: Tensor | None,
    drafts: Tensor,
    counts: Tensor,
    sequences: Tensor,
    positions: Tensor,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Accept drafts so that what is emitted is distributed as if drawn from p one by one.

    p: f32 [S + B, V], for each sequence its counts[b] + 1 target distributions. q: f32 [S, V], what
    each draft was drawn from, or None where drafts are certain (n-grams). drafts: int64 [S].
    counts, sequences: int64 [B]. positions: int64 [B], that of each first draft. Returns the number
    accepted int64 [B] and the token that follows them int64 [B]: from max(p - q, 0) after a
    rejection, else from p. Source: Leviathan et al. 2023, algorithm 1.
    Raises SaltireError for shapes, counts or drafts out of range.
    """
    try:
        found = torch.ops.saltire.speculate_verify(p, q, drafts, counts, sequences, positions, seed)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    if _may_look(p) and bool((found[0] < 0).any()):
        _blame(drafts, counts, p.shape[-1])
    return found


def _may_look(result: Tensor) -> bool:
    """Whether this is a CUDA device's result that may be waited for: bad input is marked there."""
    return (
        result.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


def _blame(drafts: Tensor, counts: Tensor, V: int) -> None:
    """Raise SaltireError for the first count or draft that is out of range."""
    for count in counts[counts < 0][:1].tolist():
        raise SaltireError(f"speculate_verify: counts holds {count}; expected 0 or more.")
    if int(counts.sum()) != drafts.shape[0]:
        raise SaltireError(
            f"speculate_verify: counts make {int(counts.sum())}, but there are {drafts.shape[0]} "
            "drafts. Pass the drafts of all sequences, one sequence after the other."
        )
    for token in drafts[(drafts < 0) | (drafts >= V)][:1].tolist():
        raise SaltireError(
            f"speculate_verify: drafts holds token {token}; the target's vocabulary has {V}. "
            "Draft and target must have the same vocabulary."
        )


@torch.library.register_fake("saltire::warp_logits")
def _(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    return torch.empty_like(logits)


@torch.library.register_fake("saltire::draw_tokens")
def _(p: Tensor, sequences: Tensor, positions: Tensor, seed: int, draft: bool) -> Tensor:
    return p.new_empty((p.shape[0],), dtype=torch.int64)


@torch.library.register_fake("saltire::speculate_verify")
def _(
    p: Tensor,
    q: Tensor | None,
    drafts: Tensor,
    counts: Tensor,
    sequences: Tensor,
    positions: Tensor,
    seed: int,
) -> tuple[Tensor, Tensor]:
    B = counts.shape[0]
    return p.new_empty((B,), dtype=torch.int64), p.new_empty((B,), dtype=torch.int64)
