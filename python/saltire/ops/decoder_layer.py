"""One step of a decoder over all its kept layers, in one call (room ``csrc/decoder_layer``).

``saltire.nn.Decoder`` is what to use; these are its bare ops. ``saltire.reference.decoder_layer``
is the specification.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import library  # noqa: F401  (loads the compiled ops)

ROW_COLUMNS = ("token", "sequence", "position", "slot", "prefix", "tree")
PRIVATE = -1  # slot of a row whose key and value go nowhere
ATTENTION, MLP = 1, 2  # the units of a layer
SLOT_BLOCK = 16  # a cache has a multiple of so many slots
HEAD_DIM_MULTIPLE = 16
MAX_HEAD_DIM = 256
CONFIDENCE_BINS = 16  # equal ranges of a draft's own probability of its token


def decoder_open(
    tensors: Sequence[Tensor],
    sizes: Sequence[int],
    description: Sequence[int],
    clips: Sequence[float],
    eps: float,
) -> Tensor:
    """Open a decoder on tensors that already exist; nothing is copied.

    tensors: the embedding, f32, bf16 or f16 [V, D], then any others. sizes: hidden, ffn, heads,
    kv_heads, head_dim, vocabulary. description, by index into tensors (-1: none): final norm; the
    head as a linear; then for each layer its window (0: none), input_norm, post_norm, q_norm,
    k_norm and the linears q, k, v, o, gate, up, down. A linear is weight, bias and the bits of its
    activations; 0 bits: the weight is f32, bf16 or f16 [N, K]; else it is a prepacked uint8 buffer
    and these follow: 1 if it is the first of two factors, else 0; the Hadamard block, diag, left,
    right, low_rank_in and low_rank_out; then the second factor, a linear as well. clips: one for
    each linear, in the same order. Norms and biases are f32.
    Returns the handle, int64 [1]; the tensors live until ``decoder_close``. Raises SaltireError.
    """
    try:
        return torch.ops.saltire.decoder_open(
            list(tensors), list(sizes), list(description), list(clips), eps
        )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


def decoder_close(handle: Tensor) -> None:
    """Let go of an open decoder's tensors."""
    torch.ops.saltire.decoder_close(handle)


def decoder_step(
    handle: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    rotation: Tensor,
    rows: Tensor,
    units: Tensor,
    wanted: Tensor,
    logits: Tensor,
    hidden: Tensor | None = None,
    trace: Tensor | None = None,
    *,
    prefill: bool,
) -> tuple[Tensor, Tensor]:
    """Run M rows through the kept units; write their keys and values to the cache.

    kv: f32, bf16 [L, 2, B, kv_heads, T, head_dim], or uint8 with head_dim values of 8, 4 or 2 bits,
    written in place; keys are transposed in blocks of 16 slots. scales: f16
    [L, 2, B, kv_heads, 2, T] for uint8: code · scale + low (``reference.kv_cache``). rotation: f32
    [positions, 2, head_dim / 2], cosines then sines. rows: int64 [M, 6], the columns ROW_COLUMNS:
    a row sees slots [0, prefix) within its layer's window, and prefix + i where bit i of tree is
    set; slot PRIVATE: it also sees itself, and nothing is written. Rows of a sequence stand side by
    side. units: uint8 [L], ATTENTION | MLP. wanted: int64 [m], the rows whose logits are wanted.
    logits: f32 [m, V], written. hidden: f32 [M, D], the state in place of the embedding; holds the
    state after the last unit. trace: f32 [2L + 1, m, D], the wanted rows' states before, between
    and after all units. prefill: choose the products for many rows; changes the order of sums.

    Returns best int64 [m], the first index of the largest logit, and its probability f32 [m].
    """
    try:
        return torch.ops.saltire.decoder_step(
            handle,
            kv,
            scales,
            rotation,
            rows,
            units,
            wanted,
            logits,
            hidden,
            trace,
            prefill=prefill,
        )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


def decoder_draft(
    handle: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    rotation: Tensor,
    starts: Tensor,
    units: Tensor,
    survival: Tensor,
    longest: int,
    confidence: float = 0.0,
    worth: float = 0.0,
    head_outputs: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draft greedily for B sequences, step after step without returning in between.

    starts: int64 [B, 4]: a token that is not yet in the cache, its sequence, its slot (and
    position), and the most drafts wanted, up to ``longest``. Fewer come where a draft's share, its
    own probability, is below ``confidence``, or where the chance that it stands with all before it,
    the product of survival[bin of the share], f32 [CONFIDENCE_BINS], is below ``worth``: that draft
    is the last. head_outputs: only the first so many tokens may come; 0: all. Writes keys and
    values behind each start, as ``decoder_step`` does.

    Returns tokens int64 [B, longest], their shares f32 [B, longest] and counts int64 [B]; -1 past a
    count.
    """
    try:
        return torch.ops.saltire.decoder_draft(
            handle,
            kv,
            scales,
            rotation,
            starts,
            units,
            survival,
            longest,
            confidence,
            worth,
            head_outputs,
        )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


@torch.library.register_fake("saltire::decoder_draft")
def _(
    handle: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    rotation: Tensor,
    starts: Tensor,
    units: Tensor,
    survival: Tensor,
    longest: int,
    confidence: float,
    worth: float,
    head_outputs: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = starts.new_empty((starts.shape[0], longest))
    return tokens, survival.new_empty(tokens.shape), starts.new_empty((starts.shape[0],))


@torch.library.register_fake("saltire::decoder_step")
def _(
    handle: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    rotation: Tensor,
    rows: Tensor,
    units: Tensor,
    wanted: Tensor,
    logits: Tensor,
    hidden: Tensor | None,
    trace: Tensor | None,
    *,
    prefill: bool,
) -> tuple[Tensor, Tensor]:
    m = logits.shape[0]
    return logits.new_empty((m,), dtype=torch.int64), logits.new_empty((m,))


@torch.library.register_fake("saltire::decoder_open")
def _(
    tensors: list[Tensor], sizes: list[int], description: list[int], clips: list[float], eps: float
) -> Tensor:
    return tensors[0].new_empty((1,), dtype=torch.int64)


@torch.library.register_fake("saltire::decoder_close")
def _(handle: Tensor) -> None:
    return None
