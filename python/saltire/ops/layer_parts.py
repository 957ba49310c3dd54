"""The parts of a decoder layer as ops of their own (room ``csrc/decoder_layer``).

On a CUDA device each is one kernel; on the CPU the specification, ``reference.layer_parts``, stands
in, so that what is composed of them runs and is tested anywhere. ``rows`` is int64 [M, 6], as
``decoder_step`` takes it; its contents are the caller's care.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import library  # noqa: F401  (loads the compiled ops)
from saltire.reference import layer_parts as reference

Quantized = tuple[Tensor, Tensor, Tensor]
LARGEST_HADAMARD = 256  # that fits the registers of a warp
RUN = 8  # values of a token that a thread takes at once
LONGEST_TOKEN = 32768
TILE_QUERIES = 4  # that share each load of the cache


def embed_rows(rows: Tensor, embedding: Tensor, state: Tensor) -> None:
    """state[m] = embedding[token of row m]. embedding: f32, bf16 or f16 [V, D]. state: f32 [M, D],
    written."""
    _call("embed_rows", rows, embedding, state)


def residual_norm(
    state: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    trace: Tensor | None = None,
) -> Tensor:
    """state += delta, then its RMS norm: ``state / sqrt(mean(state²) + eps) · gain``.

    state: f32 [M, D], written. delta: out_dtype [M, D] or None. gain: f32 [D]. trace: f32 [M, D],
    gets the new state too. Returns out_dtype (f32 or bf16) [M, D]; D a multiple of 8
    up to 16,384.
    """
    y: Tensor = _call("residual_norm", state, delta, gain, eps, out_dtype, trace)
    return y


def residual_norm_quantize(
    state: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    trace: Tensor | None,
    bits: int,
    diag: Tensor | None,
    hadamard: int,
    clip: float,
    sum_group: int,
) -> Quantized:
    """``residual_norm``, and ``transform_quantize`` of its result before it is rounded to anything
    else. hadamard: up to 256. sum_group: 0 or a multiple of 8. Returns codes, scale and sums."""
    codes: Quantized = _call(
        "residual_norm_quantize",
        state,
        delta,
        gain,
        eps,
        trace,
        bits,
        diag,
        hadamard,
        clip,
        sum_group,
    )
    return codes


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) ∘ up of f32 or bf16 [M, 2F], gates first: [M, F] of the same dtype; F a
    multiple of 8 up to 32,768."""
    y: Tensor = _call("swiglu", gate_up)
    return y


def swiglu_quantize(
    gate_up: Tensor, bits: int, diag: Tensor | None, hadamard: int, clip: float, sum_group: int
) -> Quantized:
    """``swiglu``, and ``transform_quantize`` of its result; arguments as for the norm."""
    codes: Quantized = _call("swiglu_quantize", gate_up, bits, diag, hadamard, clip, sum_group)
    return codes


def append_heads(
    qkv: Tensor,
    rows: Tensor,
    rotation: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    heads: int,
    kv: Tensor,
    scales: Tensor | None,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """Norm of each head of q and k, rotation by position; keys and values go to their slots.

    qkv: f32 or bf16 [M, (heads + 2·kv_heads)·d]. rotation: f32 [positions, 2, d / 2]. q_norm,
    k_norm: f32 [d], both or none. kv, scales: the whole cache, written at ``layer``. Returns the
    queries times 1 / √d, f32 [M, heads, d], and the rows' own keys, then values, f32
    [2, M, kv_heads, d]; all rotated by a Hadamard matrix if the cache holds codes.
    """
    result: tuple[Tensor, Tensor] = _call(
        "append_heads", qkv, rows, rotation, q_norm, k_norm, eps, heads, kv, scales, layer
    )
    return result


def attend_heads(
    queries: Tensor,
    own: Tensor,
    rows: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    layer: int,
    window: int,
    prompt: bool,
    out_dtype: torch.dtype,
    scratch: Tensor | None,
) -> Tensor:
    """Attention of each row over what it sees, from what ``append_heads`` gave: [M, heads·d].

    prompt: all rows are of one sequence, each in a slot, and there are many, so the cache is not
    split among blocks and neighbouring rows share it; changes the order of sums, and over a
    bfloat16 cache with heads of 64 or 128 rounds queries and shares to bfloat16. scratch: int32
    zeros, at least ``attention_counters``, left zero; None only for a prompt or on the CPU.
    """
    y: Tensor = _call(
        "attend_heads", queries, own, rows, kv, scales, layer, window, prompt, out_dtype, scratch
    )
    return y


def best_logits(y: Tensor, logits: Tensor, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    """The first index of each row's largest logit, int64 [M], and its probability, f32 [M].

    y: f32 or bf16 [M, V]. logits: f32 [M, V], gets a copy. scratch: int32 zeros, at least M, left
    zero; None only on the CPU.
    """
    best: tuple[Tensor, Tensor] = _call("best_logits", y, logits, scratch)
    return best


def attention_counters(rows: int, heads: int, kv_heads: int) -> int:
    """How many counters ``attend_heads`` needs for so many rows."""
    return rows * kv_heads * -(-heads // kv_heads // TILE_QUERIES)


def _call(name: str, *arguments: object) -> Any:
    try:
        return getattr(torch.ops.saltire, name)(*arguments)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


# --- on the CPU: the specification ---------------------------------------------------------------


def _embed_rows(rows: Tensor, embedding: Tensor, state: Tensor) -> None:
    state.copy_(embedding[rows[:, 0]])


def _residual_norm(
    state: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    trace: Tensor | None,
) -> Tensor:
    if delta is not None and delta.dtype != out_dtype:
        raise RuntimeError(f"residual_norm: delta is {delta.dtype}; expected {out_dtype}.")
    total, y = reference.residual_norm(state, delta, gain, eps)
    state.copy_(total)
    if trace is not None:
        trace.copy_(total)
    return y.to(out_dtype)


def _residual_norm_quantize(
    state: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    trace: Tensor | None,
    *how: object,
) -> Quantized:
    total, y = reference.residual_norm(state, delta, gain, eps)
    for target in (state, trace):
        if target is not None:
            target.copy_(total)
    return _quantize(y, *how)


def _swiglu(gate_up: Tensor) -> Tensor:
    return reference.swiglu(gate_up.float()).to(gate_up.dtype)


def _swiglu_quantize(gate_up: Tensor, *how: object) -> Quantized:
    return _quantize(reference.swiglu(gate_up.float()), *how)


def _quantize(y: Tensor, *how: object) -> Quantized:
    bits, diag, hadamard, clip, sum_group = how
    codes: Quantized = torch.ops.saltire.transform_quantize(
        y, bits, diag=diag, hadamard=hadamard, clip=clip, sum_group=sum_group
    )
    return codes


def _attend_heads(
    queries: Tensor,
    own: Tensor,
    rows: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    layer: int,
    window: int,
    prompt: bool,
    out_dtype: torch.dtype,
    scratch: Tensor | None,
) -> Tensor:
    y = reference.attend_heads(queries, own, rows, kv, scales, layer, window)
    return y.to(out_dtype)


def _best_logits(y: Tensor, logits: Tensor, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    logits.copy_(y)
    return logits.argmax(-1), logits.softmax(-1).amax(-1)


_ON_CPU: dict[str, Callable[..., object]] = {
    "embed_rows": _embed_rows,
    "residual_norm": _residual_norm,
    "residual_norm_quantize": _residual_norm_quantize,
    "swiglu": _swiglu,
    "swiglu_quantize": _swiglu_quantize,
    "append_heads": reference.append_heads,
    "attend_heads": _attend_heads,
    "best_logits": _best_logits,
}
for _name, _part in _ON_CPU.items():
    torch.library.impl(f"saltire::{_name}", "CPU", _part)


# --- shapes --------------------------------------------------------------------------------------


def _codes_like(like: Tensor, M: int, K: int, sum_group: int) -> Quantized:
    return (
        like.new_empty((M, K), dtype=torch.int8),
        like.new_empty((M,), dtype=torch.float32),
        like.new_empty((M, K // (sum_group or K)), dtype=torch.int32),
    )


@torch.library.register_fake("saltire::embed_rows")
def _(rows: Tensor, embedding: Tensor, state: Tensor) -> None:
    return None


@torch.library.register_fake("saltire::residual_norm")
def _(
    state: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    trace: Tensor | None,
) -> Tensor:
    return state.new_empty(state.shape, dtype=out_dtype)


@torch.library.register_fake("saltire::residual_norm_quantize")
def _(
    state: Tensor,
    delta: Tensor | None,
    gain: Tensor,
    eps: float,
    trace: Tensor | None,
    bits: int,
    diag: Tensor | None,
    hadamard: int,
    clip: float,
    sum_group: int,
) -> Quantized:
    return _codes_like(state, state.shape[0], state.shape[1], sum_group)


@torch.library.register_fake("saltire::swiglu")
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


@torch.library.register_fake("saltire::swiglu_quantize")
def _(
    gate_up: Tensor, bits: int, diag: Tensor | None, hadamard: int, clip: float, sum_group: int
) -> Quantized:
    return _codes_like(gate_up, gate_up.shape[0], gate_up.shape[1] // 2, sum_group)


@torch.library.register_fake("saltire::append_heads")
def _(
    qkv: Tensor,
    rows: Tensor,
    rotation: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    heads: int,
    kv: Tensor,
    scales: Tensor | None,
    layer: int,
) -> tuple[Tensor, Tensor]:
    M, d = qkv.shape[0], 2 * rotation.shape[2]
    f32 = torch.float32
    return (
        qkv.new_empty((M, heads, d), dtype=f32),
        qkv.new_empty((2, M, kv.shape[3], d), dtype=f32),
    )


@torch.library.register_fake("saltire::attend_heads")
def _(
    queries: Tensor,
    own: Tensor,
    rows: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    layer: int,
    window: int,
    prompt: bool,
    out_dtype: torch.dtype,
    scratch: Tensor | None,
) -> Tensor:
    M, H, d = queries.shape
    return queries.new_empty((M, H * d), dtype=out_dtype)


@torch.library.register_fake("saltire::best_logits")
def _(y: Tensor, logits: Tensor, scratch: Tensor | None) -> tuple[Tensor, Tensor]:
    M = y.shape[0]
    return y.new_empty((M,), dtype=torch.int64), y.new_empty((M,), dtype=torch.float32)
