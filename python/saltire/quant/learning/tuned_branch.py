"""The low-rank branch of a quantised linear while its scales are learned.

As in the rest of the end-to-end step the stored codes stay; each row of either factor learns its
scale, so that the branch follows what the weight, its input's diagonal and its neighbours become.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saltire.nn.quant_linear import QuantLinear, decode_rows


class TunedBranch(nn.Module):
    """``z·upᵀ`` with z = (x ∘ d)·downᵀ: low-rank products of the unquantised input.

    d is the diagonal of the layer's transform, which is learned elsewhere.
    """

    down: Tensor
    up: Tensor

    def __init__(self, like: QuantLinear) -> None:
        super().__init__()
        bits = like.format.rank_bits
        assert like.branch_in is not None
        assert like.branch_out is not None
        self.stored = like.branch_in, like.branch_out
        # What the codes count, before their scales.
        down, up = (decode_rows(s, torch.ones(len(s)), bits) for s in self.stored)
        self.register_buffer("down", like.before_rotation(down))
        self.register_buffer("up", up)
        self.log_in, self.log_out = (
            nn.Parameter(torch.zeros(len(stored)) if scale is None else scale.log())
            for stored, scale in zip(
                self.stored, (like.branch_in_scale, like.branch_out_scale), strict=True
            )
        )

    def forward(self, x: Tensor, diag: Tensor) -> Tensor:
        """x: float32 [M, K]; diag: [K]. Returns float32 [M, N]."""
        z = ((x * diag) @ self.down.T) * self.log_in.exp()
        return (z @ self.up.T) * self.log_out.exp()

    def put_into(self, layer: QuantLinear) -> None:
        """Store the factors, with what was learned, in a layer of the same format."""
        layer.branch_in, layer.branch_out = self.stored
        scales = self.log_in.detach().exp(), self.log_out.detach().exp()
        if layer.format.rank_bits == 16:
            layer.branch_in, layer.branch_out = (
                (stored.float() * scale[:, None]).half()
                for stored, scale in zip(self.stored, scales, strict=True)
            )
        else:
            layer.branch_in_scale, layer.branch_out_scale = scales
