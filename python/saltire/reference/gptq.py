"""GPTQ's rounding in plain torch, float64: the specification."""

from __future__ import annotations

import torch
from torch import Tensor


def gptq_round(
    w: Tensor, order: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> Tensor:
    """See ``saltire.ops.gptq_round``."""
    K = w.shape[1]
    left, U = w.double()[:, order], factor.double()
    codes = torch.empty(w.shape, dtype=torch.uint8)
    for j, k in enumerate(order.tolist()):
        group = k // (K // scale.shape[1])
        s, z = scale[:, group].double(), zero[:, group].double()
        code = (left[:, j] / s + z).round().clamp(0, 2**bits - 1)
        error = (left[:, j] - (code - z) * s) / U[j, j]
        left[:, j + 1 :] -= error[:, None] * U[j, j + 1 :]
        codes[:, k] = code.to(torch.uint8)
    return codes
