"""Rounding that gradients pass through as if it were not there, except where it clips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saltire.reference.lowbit_gemm import SYMMETRIC_ZERO


class _RoundClamp(torch.autograd.Function):
    """clamp(round(v), low, high); the gradient is 1 where v is in range and 0 where clipped."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward((v >= low - 0.5) & (v <= high + 0.5))
        return v.round().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None


def round_tokens(y: Tensor, bits: int, clip: Tensor | float = 1.0) -> Tensor:
    """As ``transform_quantize`` rounds each token; differentiable in y and clip: float [M, K]."""
    Q = 2 ** (bits - 1) - 1
    scale = (y.abs().amax(-1, keepdim=True) * (clip / Q)).clamp_min(1e-30)
    return _RoundClamp.apply(y / scale, -Q, Q) * scale


def round_weights(w: Tensor, bits: int, group: int, clip: Tensor) -> Tensor:
    """To the nearest symmetric level; differentiable in w and clip.

    w: float [N, K]. clip: float [N, 1] or [N, K / group], the share of each range that is kept.
    """
    N, K = w.shape
    blocks = w.reshape(N, -1, group or K)
    zero, top = SYMMETRIC_ZERO[bits], 2**bits - 1
    scale = (blocks.abs().amax(-1) * clip / (top - zero)).clamp_min(1e-30)[..., None]
    # Levels are code - zero with whole codes, so halves stand between them where zero is 1.5.
    codes = _RoundClamp.apply(blocks / scale + zero, 0, top)
    return ((codes - zero) * scale).reshape(N, K)
