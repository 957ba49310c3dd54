"""Specification of the parts of a decoder layer that a device runs one after another: plain torch.

``saltire.ops.layer_parts`` says what the arguments mean. Sums are in the dtype of what is given, so
float64 gives the exact values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saltire.reference.decoder_layer import rms_norm, rotate, visible_slots
from saltire.reference.kv_cache import read_heads, rotate_heads, round_heads

SLOT_BLOCK = 16


def residual_norm(
    state: Tensor, delta: Tensor | None, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The new state, state + delta, and its norm times the gain."""
    total = state if delta is None else state + delta.to(state.dtype)
    return total, rms_norm(total, gain.to(total.dtype), eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) ∘ up of [..., 2F], gates first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


# --- the cache -----------------------------------------------------------------------------------


def cache_bits(kv: Tensor, head_dim: int) -> int:
    """Bits of a code of the cache, 0 if it holds numbers."""
    return 8 * kv.shape[-1] // head_dim if kv.dtype == torch.uint8 else 0


def read_cache(
    kv: Tensor, scales: Tensor | None, layer: int, sequence: int, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Keys and values as float32 [kv_heads, T, head_dim]; codes are read, still rotated."""
    keys, values = kv[layer, 0, sequence], kv[layer, 1, sequence]
    G, T, width = keys.shape
    # Keys: [T / 16, width, 16], the slots of a block side by side.
    keys = keys.reshape(G, T // SLOT_BLOCK, width, SLOT_BLOCK).transpose(2, 3).reshape(G, T, width)
    bits = cache_bits(kv, head_dim)
    if not bits:
        return keys.float(), values.float()
    assert scales is not None
    c, top = 8 // bits, 2**bits - 1
    places = torch.arange(c, device=kv.device) * bits
    key_codes = (keys[..., None].int() >> places & top).reshape(G, T, head_dim)
    grouped = values.reshape(G, T, head_dim // 16, 1, 16 // c).int()
    value_codes = (grouped >> places[:, None] & top).reshape(G, T, head_dim)
    heads = []
    for kind, codes in enumerate((key_codes, value_codes)):
        grids = scales[layer, kind, sequence]  # [kv_heads, 2, T]
        heads.append(read_heads(codes, grids[:, 0, :, None], grids[:, 1, :, None]))
    return heads[0], heads[1]


def write_cache(
    kv: Tensor, scales: Tensor | None, layer: int, row: list[int], key: Tensor, value: Tensor
) -> None:
    """Put a row's key and value, float32 [kv_heads, head_dim], in its slot; rotated before if the
    cache holds codes."""
    sequence, slot, d = row[1], row[3], key.shape[-1]
    bits, (block, place) = cache_bits(kv, d), divmod(slot, SLOT_BLOCK)
    if bits:
        assert scales is not None
        c = 8 // bits
        places = torch.arange(c, device=kv.device) * bits
        stored = []
        for kind, x in enumerate((key, value)):
            codes, scale, low = round_heads(x, bits)
            scales[layer, kind, sequence, :, 0, slot] = scale[..., 0]
            scales[layer, kind, sequence, :, 1, slot] = low[..., 0]
            if kind == 0:
                fields = codes.view(-1, d // c, c)
            else:
                fields = codes.view(-1, d // 16, c, 16 // c).transpose(2, 3)
            stored.append((fields.int() << places).sum(-1).flatten(1).to(torch.uint8))
        key, value = stored
    G, T, width = kv.shape[3:]
    blocks = kv[layer, 0, sequence].view(G, T // SLOT_BLOCK, width, SLOT_BLOCK)
    blocks[:, block, :, place] = key.to(kv.dtype)
    kv[layer, 1, sequence, :, slot] = value.to(kv.dtype)


# --- heads ---------------------------------------------------------------------------------------


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
    """Queries [M, heads, d] and the rows' own keys and values [2, M, kv_heads, d]."""
    d, G = rotation.shape[-1] * 2, kv.shape[3]
    x = qkv.float().view(qkv.shape[0], heads + 2 * G, d)
    q, k, v = x.split([heads, G, G], dim=1)
    if q_norm is not None and k_norm is not None:
        q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    cosine, sine = (rotation[rows[:, 2], i][:, None] for i in (0, 1))
    q, k = rotate(q, cosine, sine), rotate(k, cosine, sine)
    if kv.dtype == torch.uint8:
        q, k, v = (rotate_heads(t.contiguous()) for t in (q, k, v))
    for m, row in enumerate(rows.tolist()):
        if row[3] >= 0:
            write_cache(kv, scales, layer, row, k[m], v[m])
    return q * d**-0.5, torch.stack([k, v])


def attend_heads(
    queries: Tensor,
    own: Tensor,
    rows: Tensor,
    kv: Tensor,
    scales: Tensor | None,
    layer: int,
    window: int,
) -> Tensor:
    """What each head of each row sees: [M, heads · d]."""
    M, H, d = queries.shape
    group = H // kv.shape[3]
    caches: dict[int, tuple[Tensor, Tensor]] = {}
    out = torch.empty_like(queries)
    for m, row in enumerate(rows.tolist()):
        if row[1] not in caches:
            caches[row[1]] = read_cache(kv, scales, layer, row[1], d)
        seen = visible_slots(row, window)
        keys, values = (t[:, seen].to(queries.dtype) for t in caches[row[1]])
        if row[3] < 0:
            keys, values = (
                torch.cat([t, mine[m, :, None].to(t.dtype)], dim=1)
                for t, mine in zip((keys, values), own, strict=True)
            )
        keys, values = (t.repeat_interleave(group, dim=0) for t in (keys, values))
        share = torch.einsum("hd,htd->ht", queries[m], keys).softmax(-1)
        out[m] = torch.einsum("ht,htd->hd", share, values)
    if kv.dtype == torch.uint8:
        out = rotate_heads(out)  # back: values lie rotated
    return out.view(M, H * d)
