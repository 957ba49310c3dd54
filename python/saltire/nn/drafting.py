"""Greedy drafting step by step: what the native decoder does in one call."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from saltire.nn.decoder import Decoder, StepResult
from saltire.nn.kv_cache import KVCache
from saltire.ops.decoder_layer import CONFIDENCE_BINS


def draft_by_steps(
    decoder: Decoder,
    cache: KVCache,
    starts: Sequence[Sequence[int]],
    survival: Tensor,
    units: Tensor | None,
    confidence: float,
    worth: float,
    head_outputs: int,
) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and shares as ``decoder_draft`` gives them. The host looks at each token, for a draft
    that is in doubt must end; a step costs more than the look."""
    chances = survival.tolist()
    tokens: list[list[int]] = [[] for _ in starts]
    shares: list[list[float]] = [[] for _ in starts]
    stands = [1.0] * len(starts)
    alive = [b for b, start in enumerate(starts) if start[3] > 0]
    while alive:
        rows = []
        for b in alive:
            token, sequence, slot, _ = starts[b]
            slot += len(tokens[b])
            token = tokens[b][-1] if tokens[b] else token
            rows.append([token, sequence, slot, slot, slot + 1, 0])
        result = decoder.step_rows(cache, rows, range(len(rows)), units)
        best, sure = _best(result, head_outputs)
        going = []
        for b, token, share in zip(alive, best, sure, strict=True):
            tokens[b].append(token)
            shares[b].append(share)
            place = min(max(int(share * CONFIDENCE_BINS), 0), CONFIDENCE_BINS - 1)
            stands[b] *= chances[place]
            more = len(tokens[b]) < starts[b][3]
            if more and share >= confidence and stands[b] >= worth:
                going.append(b)
        alive = going
    return tokens, shares


def _best(result: StepResult, head_outputs: int) -> tuple[list[int], list[float]]:
    """The best tokens and their shares, of the first ``head_outputs`` tokens if it is not 0."""
    if not 0 < head_outputs < result.logits.shape[1]:
        return result.best.tolist(), result.share.tolist()
    some = result.logits[:, :head_outputs]
    return some.argmax(-1).tolist(), some.softmax(-1).amax(-1).tolist()
