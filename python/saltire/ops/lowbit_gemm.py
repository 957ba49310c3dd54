"""Products of low-bit activations and low-bit weights, and the layouts of those weights.

Codes, containers and the checkpoint layout are drawn in csrc/core/formats.h, the prepacked layout
in csrc/lowbit_gemm/op.h. ``saltire.reference.lowbit_gemm`` is the specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import library  # noqa: F401  (loads the compiled ops)
from saltire.reference import lowbit_gemm as reference

CONTAINER_BITS = {2: 2, 3: 4, 4: 4, 8: 8}
HEADER_BYTES = 64
BLOCK = 32  # outputs of a block of the prepacked layout
# The same of CUDA's layout, csrc/lowbit_gemm/device_layout.h.
DEVICE_BLOCK, DEVICE_SLAB, DEVICE_TAIL = 64, 128, 80


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Pack weight codes into the checkpoint layout, lowest bits first.

    codes: uint8 [N, K], each below 2**bits. bits: 2, 3 (in a 4-bit container), 4 or 8.
    Returns uint8 [N, K·c/8] with c the container: 2, 4 or 8. Raises SaltireError if a code is too
    large or if K does not fill whole bytes.
    """
    try:
        return torch.ops.saltire.pack_weight(codes, bits)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


def unpack_weight(packed: Tensor, bits: int) -> Tensor:
    """The inverse of ``pack_weight``: uint8 [N, K·c/8] -> codes uint8 [N, K]."""
    try:
        return torch.ops.saltire.unpack_weight(packed, bits)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


def prepack_weight(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int = 0
) -> Tensor:
    """Lay a weight out for this processor's ``lowbit_gemm``: one buffer that names its own format.

    packed: uint8 [N, K·c/8] from ``pack_weight``; K a multiple of 32. scale: f32 or f16
    [N, K/group]; group 0: one group of K, else a multiple of 32 that divides K. zero: as scale, or
    None for a symmetric weight. Returns uint8 [bytes]: header, then codes, scales and zeros in the
    order in which the kernel reads them, none of them changed, so ``unprepack_weight`` undoes it
    exactly. The layout does not depend on the instruction set; a CUDA tensor gets CUDA's layout,
    which depends on no architecture either. Raises SaltireError.
    """
    try:
        return torch.ops.saltire.lowbit_prepack(packed, scale, zero, bits, group)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


def unprepack_weight(
    w: Tensor, n: int, k: int, bits: int, group: int, has_zero: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The exact inverse of ``prepack_weight``: returns (packed, scale, zero or None).

    w: uint8 [bytes]; the other arguments as prepacked. Raises SaltireError if the buffer is not a
    prepacked weight, is truncated, or was prepacked with other arguments.
    """
    try:
        packed, scale, zero = torch.ops.saltire.lowbit_unprepack(
            w, n, k, bits, group, has_zero, scale_dtype
        )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    return packed, scale, zero if has_zero else None


def lowbit_gemm(
    codes: Tensor,
    x_scale: Tensor,
    x_sum: Tensor,
    w: Tensor,
    n: int,
    bits: int,
    group: int = 0,
    *,
    act_bits: int = 8,
    out_dtype: torch.dtype = torch.float32,
    bias: Tensor | None = None,
    low_rank_x: Tensor | None = None,
    low_rank_w: Tensor | None = None,
) -> Tensor:
    """Multiply low-bit activations by a prepacked low-bit weight::

        y[m, n] = x_scale[m] · Σ_g scale[n, g] · (dot[m, n, g] - zero[n, g]·x_sum[m, g])
                  + Σ_r low_rank_x[m, r]·low_rank_w[r, n] + bias[n]
        dot[m, n, g] = Σ_k∈g codes[m, k]·u[n, k]

    The sums over k are exact integers; the rest is float32 in an order that all instruction sets
    share, so all give the same bits.

    codes: int8 [M, K], |code| < 2**(act_bits - 1). x_scale: f32 [M]; a NaN makes its row NaN.
    x_sum: int32 [M, K/group], the sums of codes over each group. w: uint8 from ``prepack_weight``
    with N = ``n``, ``bits`` and ``group``. act_bits: what codes were quantised to, 3 to 8; below 8
    AVX2 sums more products in 16 bits, and codes outside the range are refused; on a CUDA device,
    where a check would have to wait, they are the caller's care. Groups are 32, 64, 128 or 0 there.
    bias: f32 [N]. low_rank_x: f32 [M, R], computed from the unquantised x; low_rank_w: f32 [R, N].
    Returns out_dtype (f32, bf16 or f16) [M, N]. Raises SaltireError for anything else.
    """
    try:
        return torch.ops.saltire.lowbit_gemm(
            codes,
            x_scale,
            x_sum,
            w,
            n,
            bits,
            group,
            act_bits=act_bits,
            out_dtype=out_dtype,
            bias=bias,
            low_rank_x=low_rank_x,
            low_rank_w=low_rank_w,
        )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


def _pack_weight_fake(codes: Tensor, bits: int) -> Tensor:
    N, K = codes.shape
    return codes.new_empty((N, K * CONTAINER_BITS[bits] // 8), dtype=torch.uint8)


def _unpack_weight_fake(packed: Tensor, bits: int) -> Tensor:
    N, row_bytes = packed.shape
    return packed.new_empty((N, row_bytes * 8 // CONTAINER_BITS[bits]), dtype=torch.uint8)


def _prepack_fake(
    packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int
) -> Tensor:
    N, row_bytes = packed.shape
    tables = 1 if zero is None else 2
    if packed.device.type == "cuda":
        slabs = -(-row_bytes * 8 // CONTAINER_BITS[bits] // DEVICE_SLAB)
        groups = slabs * DEVICE_SLAB // group if scale.shape[1] > 1 else 1
        row = slabs * DEVICE_SLAB * CONTAINER_BITS[bits] // 8
        row += groups * scale.element_size() * tables
        tail = DEVICE_TAIL + 16 * (tables - 1) + (32 if scale.dtype == torch.float16 else 0)
        return packed.new_empty((-(-N // DEVICE_BLOCK) * DEVICE_BLOCK * row + tail,))
    row = row_bytes + scale.shape[1] * scale.element_size() * tables
    return packed.new_empty((HEADER_BYTES + (N + BLOCK - 1) // BLOCK * BLOCK * row,))


def _unprepack_fake(
    w: Tensor, n: int, k: int, bits: int, group: int, has_zero: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    groups = k // (group or k)
    return (
        w.new_empty((n, k * CONTAINER_BITS[bits] // 8)),
        w.new_empty((n, groups), dtype=scale_dtype),
        w.new_empty((n, groups) if has_zero else (0,), dtype=scale_dtype),
    )


def _lowbit_gemm_fake(
    codes: Tensor,
    x_scale: Tensor,
    x_sum: Tensor,
    w: Tensor,
    n: int,
    bits: int,
    group: int,
    *,
    act_bits: int = 8,
    out_dtype: torch.dtype,
    bias: Tensor | None = None,
    low_rank_x: Tensor | None = None,
    low_rank_w: Tensor | None = None,
) -> Tensor:
    return codes.new_empty((codes.shape[0], n), dtype=out_dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "pack_weight": _pack_weight_fake,
    "unpack_weight": _unpack_weight_fake,
    "lowbit_prepack": _prepack_fake,
    "lowbit_unprepack": _unprepack_fake,
    "lowbit_gemm": _lowbit_gemm_fake,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"saltire::{_name}", _fake)


def _pack_on_device(codes: Tensor, bits: int) -> Tensor:
    if int(codes.max()) >= 2**bits:
        raise SaltireError(f"pack_weight: codes hold a value of {2**bits} or more. Clamp them.")
    return reference.pack_weight(codes, bits)


# Both run at load and at save only, so a device has no kernels of its own for them.
torch.library.impl("saltire::pack_weight", "CUDA", _pack_on_device)
torch.library.impl("saltire::unpack_weight", "CUDA", reference.unpack_weight)
