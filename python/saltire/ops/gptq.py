"""Rounding that makes up for its own errors (room ``csrc/gptq``)."""

from __future__ import annotations

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import library  # noqa: F401  (loads the compiled ops)


def gptq_round(
    w: Tensor, order: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int
) -> Tensor:
    """Round w column by column, moving each column's error onto the columns not yet rounded.

    w: float32 [N, K]. order: int64 [K], the column that is rounded first, second, ... factor:
    float32 [K, K], upper-triangular U with UᵀU = H⁻¹, rows and columns in that order. scale, zero:
    float32 [N, G], one for each of G equal groups of columns; a code stands for scale · (code -
    zero). Returns codes uint8 [N, K] in [0, 2**bits), the same on every instruction set. On the
    CPU. Raises SaltireError for other shapes or dtypes, and an order that is no permutation.
    Source: Frantar et al., GPTQ (2022).
    """
    try:
        return torch.ops.saltire.gptq_round(w, order, factor.T.contiguous(), scale, zero, bits)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


@torch.library.register_fake("saltire::gptq_round")
def _(w: Tensor, order: Tensor, lower: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return torch.empty_like(w, dtype=torch.uint8, memory_format=torch.contiguous_format)
