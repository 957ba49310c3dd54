"""Products with two low-bit factors, the ranks rounded on their way (``csrc/factored_linear``)."""

from __future__ import annotations

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import library  # noqa: F401  (loads the compiled ops)


def factored_gemm(
    codes: Tensor,
    x_scale: Tensor,
    x_sum: Tensor,
    down: Tensor,
    up: Tensor,
    n: int,
    *,
    act_bits: int = 8,
    rank_bits: int = 8,
    clip: float = 1.0,
    hadamard: int = 1,
    diag: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply low-bit activations by two prepacked factors: ``y = Q(x·downᵀ)·upᵀ + bias``.

    The ranks are rounded to ``rank_bits`` bits as ``transform_quantize`` does (clip, hadamard,
    diag, left and right are its), block of rows after block of rows, so that they never leave the
    cache. Gives the bits of ``lowbit_gemm``, ``transform_quantize`` and ``lowbit_gemm`` in a chain.

    codes: int8 [M, K], |code| < 2**(act_bits - 1). x_scale: f32 [M]. x_sum: int32 [M, K/group].
    down, up: uint8 from ``prepack_weight``, [R, K] and [N, R]; they name their own sizes. n: N.
    bias: f32 [N]. Returns f32 [M, N]. Raises SaltireError for anything else.
    """
    try:
        return torch.ops.saltire.factored_gemm(
            codes,
            x_scale,
            x_sum,
            down,
            up,
            n,
            act_bits=act_bits,
            rank_bits=rank_bits,
            clip=clip,
            hadamard=hadamard,
            diag=diag,
            left=left,
            right=right,
            bias=bias,
        )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


@torch.library.register_fake("saltire::factored_gemm")
def _(
    codes: Tensor,
    x_scale: Tensor,
    x_sum: Tensor,
    down: Tensor,
    up: Tensor,
    n: int,
    *,
    act_bits: int,
    rank_bits: int,
    clip: float = 1.0,
    hadamard: int = 1,
    diag: Tensor | None = None,
    left: Tensor | None = None,
    right: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    return x_scale.new_empty((codes.shape[0], n))
