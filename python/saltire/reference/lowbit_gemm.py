"""Specification of ``lowbit_gemm`` and of the checkpoint layout of weights, in pure torch."""

from __future__ import annotations

import torch
from torch import Tensor

SYMMETRIC_ZERO = {2: 1.5, 3: 4.0, 4: 8.0, 8: 128.0}  # csrc/core/formats.h says why
CONTAINER_BITS = {2: 2, 3: 4, 4: 4, 8: 8}


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Pack weight codes, lowest bits first: uint8 [N, K], each < 2**bits -> uint8 [N, K·c/8].

    c is 2 for 2 bits, 4 for 3 and 4, 8 for 8. csrc/core/formats.h draws the bytes.
    """
    container = CONTAINER_BITS[bits]
    per_byte = 8 // container
    parts = codes.reshape(codes.shape[0], -1, per_byte).to(torch.int32)
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.int32) * container
    return (parts << shifts).sum(dim=-1).to(torch.uint8)


def unpack_weight(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack_weight``: uint8 [N, K·c/8] -> codes uint8 [N, K]."""
    container = CONTAINER_BITS[bits]
    shifts = torch.arange(8 // container, device=packed.device, dtype=torch.int32) * container
    parts = (packed.to(torch.int32)[..., None] >> shifts) & (2**container - 1)
    return parts.reshape(packed.shape[0], -1).to(torch.uint8)


def dequantize_weight(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int = 0
) -> Tensor:
    """``w = scale · (code - zero)``: float64 [N, K].

    scale, zero: float [N, K / group] (group 0: one group of K). zero None: symmetric.
    """
    codes = unpack_weight(packed, bits).double()
    N, K = codes.shape
    centred = codes.reshape(N, -1, group or K)
    shift = SYMMETRIC_ZERO[bits] if zero is None else zero.double()[..., None]
    return ((centred - shift) * scale.double()[..., None]).reshape(N, K)


def lowbit_gemm(
    codes: Tensor,
    x_scale: Tensor,
    x_sum: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group: int = 0,
    bias: Tensor | None = None,
    low_rank_x: Tensor | None = None,
    low_rank_w: Tensor | None = None,
) -> Tensor:
    """Activations of low bits times weights of low bits, float64 [M, N]::

        y[m, n] = x_scale[m] · Σ_g scale[n, g] · (Σ_k∈g x[m, k]·u[n, k] - zero[n, g]·x_sum[m, g])
                  + Σ_r low_rank_x[m, r]·low_rank_w[r, n] + bias[n]

    The inner sums are exact integers. codes: int8 [M, K]; x_scale: float [M]; x_sum: int32
    [M, K / group]; packed, scale, zero, bits, group: as in ``dequantize_weight``; bias: [N];
    low_rank_x: [M, R], computed by the caller from the unquantised x; low_rank_w: [R, N].
    """
    u = unpack_weight(packed, bits).double()
    (M, K), N = codes.shape, u.shape[0]
    G = group or K
    x = codes.double().reshape(M, K // G, G)
    dots = torch.einsum("mgk,ngk->mng", x, u.reshape(N, K // G, G))
    shift = SYMMETRIC_ZERO[bits] if zero is None else zero.double()
    y = ((dots - shift * x_sum.double()[:, None, :]) * scale.double()).sum(dim=-1)
    y = y * x_scale.double()[:, None]
    if low_rank_x is not None and low_rank_w is not None:
        y = y + low_rank_x.double() @ low_rank_w.double()
    if bias is not None:
        y = y + bias.double()
    return y
