"""CLaSp's choice at one layer (room ``csrc/skip_plan``)."""

from __future__ import annotations

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import library  # noqa: F401  (loads the compiled ops)


def skip_plan_select(keep: Tensor, skip: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose for each row the state that is nearer to the truth by cosine; equal: the skipped one.

    keep: f32 [M, D], states that have run the layer. skip: f32 [M, D], states that have not. truth:
    f32 [D], the whole model's state. Returns the chosen states f32 [M, D], kept uint8 [M], and
    their cosines f32 [M] (0 for a state of zeros). Raises SaltireError for other shapes or types.
    Source: CLaSp, algorithm 1.
    """
    try:
        return torch.ops.saltire.skip_plan_select(keep, skip, truth)
    except RuntimeError as error:
        raise SaltireError(str(error)) from None


@torch.library.register_fake("saltire::skip_plan_select")
def _(keep: Tensor, skip: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    M = keep.shape[0]
    return torch.empty_like(keep), keep.new_empty((M,), dtype=torch.uint8), keep.new_empty((M,))
