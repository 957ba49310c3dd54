"""Specification of a decoder step: plain torch, one row after another, in the weights' dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class ReferenceCache:
    """Keys and values by (layer, sequence, slot): each [kv_heads, head_dim]."""

    entries: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class ReferenceLayer:
    """Weights as ``nn.Linear`` has them: (weight [N, K], bias [N] or None) of q, k, v, o, gate, up,
    down; norms [D], [D], and [head_dim] or None for queries and keys; window: 0 or slots."""

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    linears: Sequence[tuple[Tensor, Tensor | None]]
    window: int = 0


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) ∘ gain over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of x [heads, d] by angles [d/2]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def decoder_step(
    layers: Sequence[ReferenceLayer],
    cache: ReferenceCache,
    state: Tensor,
    rows: Sequence[Sequence[int]],
    units: Sequence[int],
    rotation: Tensor,
    head_dim: int,
    eps: float,
) -> Tensor:
    """States after the kept units, [M, D]; ``saltire.ops.decoder_layer`` says what the rows mean.

    state: [M, D] the embeddings. units: 1 (attention) + 2 (MLP) for each layer. rotation:
    [positions, 2, head_dim / 2]. The cache gains what the rows append.
    """
    for index, (layer, kept) in enumerate(zip(layers, units, strict=True)):
        q_w, k_w, v_w, o_w, gate_w, up_w, down_w = layer.linears
        if kept & 1:
            queries, own = [], []
            for h, (_, sequence, position, slot, _, _) in zip(state, rows, strict=True):
                x = rms_norm(h, layer.input_norm, eps)
                q, k, v = (
                    torch.nn.functional.linear(x, *w).view(-1, head_dim) for w in (q_w, k_w, v_w)
                )
                if layer.q_norm is not None and layer.k_norm is not None:
                    q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
                q, k = (rotate(t, *rotation[position]) for t in (q, k))
                queries.append(q)
                own.append((k, v))
                if slot >= 0:
                    cache.entries[index, sequence, slot] = (k, v)
            outs = []
            for row, q, mine in zip(rows, queries, own, strict=True):
                seen = [cache.entries[index, row[1], s] for s in visible_slots(row, layer.window)]
                if row[3] < 0:
                    seen.append(mine)
                group = q.shape[0] // mine[0].shape[0]
                keys, values = (
                    torch.stack(t, dim=1).repeat_interleave(group, dim=0)
                    for t in zip(*seen, strict=True)
                )
                scores = torch.einsum("hd,htd->ht", q, keys) / head_dim**0.5
                outs.append(torch.einsum("ht,htd->hd", scores.softmax(-1), values).flatten())
            state = state + torch.nn.functional.linear(torch.stack(outs), *o_w)
        if kept & 2:
            x = rms_norm(state, layer.post_norm, eps)
            gate, up = (torch.nn.functional.linear(x, *w) for w in (gate_w, up_w))
            gated = torch.nn.functional.silu(gate) * up
            state = state + torch.nn.functional.linear(gated, *down_w)
    return state


def visible_slots(row: Sequence[int], window: int) -> list[int]:
    """The slots that a row sees: its prefix within the window, then its tree's."""
    _, _, position, _, prefix, tree = row
    start = min(max(position + 1 - window, 0), prefix) if window else 0
    return [*range(start, prefix), *(prefix + i for i in range(64) if tree >> i & 1)]
