"""Warped distributions and the law of speculative acceptance in plain torch: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def warp_logits(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """See ``saltire.ops.warp_logits``; float64 inside."""
    p = (logits.double() / temperature).softmax(-1)
    if 0 < top_k < p.shape[-1]:
        least = p.topk(top_k, dim=-1).values[..., -1:]
        p = p.where(p >= least, 0.0)
    if top_p < 1.0:
        ordered, index = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.where(before < top_p * p.sum(-1, keepdim=True), 0.0)
        p = torch.zeros_like(p).scatter(-1, index, ordered)
    p = p.where(p >= min_p * p.amax(-1, keepdim=True), 0.0)
    return (p / p.sum(-1, keepdim=True)).float()


def emitted_distribution(p: Tensor, q: Tensor) -> Tensor:
    """What one round of speculative acceptance emits first: f64 [V], equal to p.

    A draft x ~ q is kept with probability min(1, p(x) / q(x)); else a draw from max(p - q, 0).
    """
    p, q = p.double(), q.double()
    kept = torch.minimum(p, q)
    rest = (p - q).clamp(min=0)
    total = rest.sum()
    return kept + (1 - kept.sum()) * (rest / total if total > 0 else rest)
