"""Specification of ``token_stats``: log-prob, entropy and log-sum-exp of tokens, in pure torch."""

from __future__ import annotations

import torch
from torch import Tensor


def token_stats(
    logits: Tensor,
    labels: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> dict[str, Tensor]:
    """Statistics of softmax(cap(logits) / T), cap(x) = softcap·tanh(x / softcap), 0 for no cap.

    A logit of −∞ is masked, capped or not. A token whose label is ``ignore_index`` has zeros.
    logits: float [M, V]. Returns float64 [M] ``logprob`` (with labels), ``entropy``, ``logsumexp``
    and ``max_prob``, and int64 [M] ``argmax``; all but the last can be differentiated.
    """
    x = logits.double()
    masked = x == -torch.inf
    x = x.masked_fill(masked, 0.0)
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    z = x / torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    z = z.masked_fill(masked, -torch.inf)
    lse = z.logsumexp(dim=-1)
    log_p = z - lse[:, None]
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(masked, 0.0)).sum(dim=-1)
    out = {"entropy": entropy, "logsumexp": lse, "max_prob": p.amax(dim=-1)}
    if labels is not None:
        ignored = labels == ignore_index
        chosen = labels.masked_fill(ignored, 0)
        out["logprob"] = log_p.gather(-1, chosen[:, None]).squeeze(-1)
        out = {name: value.masked_fill(ignored, 0.0) for name, value in out.items()}
    out["argmax"] = z.argmax(dim=-1)
    return out


def linear_token_stats(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor | None = None,
    bias: Tensor | None = None,
    **rest: object,
) -> dict[str, Tensor]:
    """``token_stats`` of hidden·headᵀ + bias. hidden: float [M, D]. head: float [V, D]."""
    logits = hidden.double() @ head.double().T
    if bias is not None:
        logits = logits + bias.double()
    return token_stats(logits, labels, **rest)  # type: ignore[arg-type]
