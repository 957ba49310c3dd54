"""Rotate tokens and round them to a few bits, in one pass (room ``csrc/transform_quantize``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import library  # noqa: F401  (loads torch.ops.saltire)


def transform_quantize(
    x: Tensor,
    bits: int,
    *,
    diag: Tensor | None = None,
    hadamard: int = 1,
    left: Tensor | None = None,
    right: Tensor | None = None,
    clip: float = 1.0,
    sum_group: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Transform each token and round it symmetrically to ``bits`` bits.

    A token is seen as X [A, B], row-major, K = A·B::

        Y = leftᵀ · (X ∘ diag) · right
        scale = clip · max|Y| / Q,   code = clamp(round(Y / scale), -Q, Q),   Q = 2**(bits-1) - 1

    x: float32, bfloat16 or float16 [..., K]; any strides. bits: 3, 4 or 8. diag: float32 [K].
    hadamard: size B of an orthonormal Hadamard ``right``, a power of two dividing K (1: none).
    right: dense float32 [B, B] in its place. left: float32 [A, A]. clip: in (0, 1]. sum_group:
    codes in one sum, dividing K (0: K).

    Returns codes int8 [..., K]; scale float32 [...]; sums of codes int32 [..., K / sum_group].
    Ties go to the even code. A token of zeros has scale 0 and codes 0. A token with a NaN or an
    infinity has scale NaN and codes 0. Raises SaltireError naming the argument that does not fit.
    """
    try:
        codes, scale, sums = torch.ops.saltire.transform_quantize(
            x.flatten(0, -2) if x.dim() != 2 else x,
            bits,
            diag=diag,
            hadamard=hadamard,
            left=left,
            right=right,
            clip=clip,
            sum_group=sum_group,
        )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    if x.dim() == 2:
        return codes, scale, sums
    shape = x.shape[:-1]
    return codes.view(x.shape), scale.view(shape), sums.view(*shape, -1)


def transform(
    x: Tensor,
    *,
    diag: Tensor | None = None,
    hadamard: int = 1,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    """The transform of ``transform_quantize`` without rounding: float32 [..., K].

    Differentiable in x and diag.
    """
    tokens = x.flatten(0, -2) if x.dim() != 2 else x
    try:
        y = torch.ops.saltire.transform(tokens, diag, hadamard, left, right)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    return y.view(x.shape)


@torch.library.register_fake("saltire::transform_quantize")
def _(
    x: Tensor,
    bits: int,
    *,
    diag: Tensor | None = None,
    hadamard: int = 1,
    left: Tensor | None = None,
    right: Tensor | None = None,
    clip: float = 1.0,
    sum_group: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    M, K = x.shape
    return (
        x.new_empty((M, K), dtype=torch.int8),
        x.new_empty((M,), dtype=torch.float32),
        x.new_empty((M, K // (sum_group or K)), dtype=torch.int32),
    )


@torch.library.register_fake("saltire::transform")
def _(
    x: Tensor,
    diag: Tensor | None = None,
    hadamard: int = 1,
    left: Tensor | None = None,
    right: Tensor | None = None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, diag, hadamard, left, right = inputs
    for name, factor in (("left", left), ("right", right)):
        if factor is not None and factor.requires_grad:
            raise RuntimeError(
                f"transform: {name} requires a gradient, but transform is differentiable in x and "
                f"diag only. Use saltire.reference.transform_quantize.transform to learn {name}."
            )
    ctx.save_for_backward(x, diag, left, right)
    ctx.hadamard = hadamard


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, diag, left, right = ctx.saved_tensors
    # Y = leftᵀ·Z·right with Z = X ∘ diag, so dZ = left·dY·rightᵀ; a Hadamard is its own transpose.
    dz = torch.ops.saltire.transform(
        grad.float(),
        None,
        ctx.hadamard,
        None if left is None else left.T.contiguous(),
        None if right is None else right.T.contiguous(),
    )
    dx = dz if diag is None else dz * diag
    d_diag = (dz * x.float()).sum(0) if diag is not None and diag.requires_grad else None
    return dx.to(x.dtype), d_diag, None, None, None


torch.library.register_autograd("saltire::transform", _backward, setup_context=_setup)
