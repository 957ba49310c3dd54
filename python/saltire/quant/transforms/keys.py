"""A diagonal between queries and keys, folded into the weights that write them, exactly.

A cache rounds each head of a key to one grid after a rotation, so its noise is even over the
channels, and what it does to a score goes as the power of the query: Σ D⁻²·E[q²] times Σ D²·E[k²].
Their product is least where every channel carries the same share, D = sqrt(rms q / rms k). RoPE
turns channels i and i + d/2 into one another, so a pair has one D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LIMIT = math.log(1e2)  # of log D: half precision has no more to give away


def key_diagonal(query_power: Tensor, key_power: Tensor, size: int) -> Tensor:
    """D for every channel of every key-value head, its geometric mean 1 in each: float [Hk, size].

    query_power: float [H·size], E[q²] before RoPE; key_power: float [Hk·size]. The query heads that
    read one key-value head count together. Pairs that are zero on either side keep D = 1.
    """
    key = key_power.double().view(-1, 2, size // 2).sum(1)
    query = query_power.double().view(len(key), -1, 2, size // 2).sum((1, 2))
    log_d = (query / key).log() / 4
    alive = log_d.isfinite()
    log_d = torch.where(alive, log_d, torch.zeros_like(log_d))
    middle = log_d.sum(1, keepdim=True) / alive.sum(1, keepdim=True).clamp_min(1)
    log_d = torch.where(alive, log_d - middle, log_d).clamp(-LIMIT, LIMIT)
    return torch.cat([log_d, log_d], dim=1).exp()


@torch.no_grad()
def fold_key_diagonal(query: nn.Linear, key: nn.Linear, diagonal: Tensor) -> None:
    """Multiply the keys by D and divide the queries that read them by it. In place, and exact.

    diagonal: float [Hk, size], equal in RoPE's pairs.
    """
    share = query.out_features // key.out_features
    wide = diagonal.repeat_interleave(share, dim=0).flatten()
    for linear, factor in ((key, diagonal.flatten()), (query, 1.0 / wide)):
        for parameter in (linear.weight, linear.bias):
            if parameter is not None:
                rows = factor.to(torch.float64).view(-1, *[1] * (parameter.dim() - 1))
                parameter.data = (parameter.double() * rows).to(parameter.dtype)
