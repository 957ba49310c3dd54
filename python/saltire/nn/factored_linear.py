"""A linear layer of two low-bit factors with a few ranks between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saltire import ops
from saltire.nn.linear_format import FactoredFormat
from saltire.nn.quant_linear import Quantized, QuantLinear, SharedInput


class FactoredQuantLinear(nn.Module):
    """``y = Q(Q(T(x))·Q(down)ᵀ)·Q(up)ᵀ + b``: the ranks are quantised once, on their way.

    x: float [..., K] -> [..., N] in x's dtype. Whatever stands between the factors (DAM's diagonal,
    a rotation) is folded into both, so nothing of it is left here. On the CPU both products and
    the rounding between them are one op, in which the ranks never leave the cache. Buffers: those
    of two QuantLinears.
    """

    def __init__(
        self, in_features: int, out_features: int, format: FactoredFormat, bias: bool = False
    ) -> None:
        super().__init__()
        format.check_fits("FactoredQuantLinear", in_features)
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.down = QuantLinear(in_features, format.rank, format.down)
        self.up = QuantLinear(format.rank, out_features, format.up, bias=bias)

    @property
    def shared_input(self) -> SharedInput | None:
        return self.down.shared_input

    @shared_input.setter
    def shared_input(self, shared: SharedInput | None) -> None:
        self.down.shared_input = shared

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.down.quantized(x)
        if tokens[0].device.type == "cpu":
            y = self._both(tokens).to(x.dtype)
        else:
            ranks = self.down.multiply(tokens, torch.float32, x)
            y = self.up.multiply(self.up.quantize_input(ranks), x.dtype, ranks)
        return y.view(*x.shape[:-1], self.out_features)

    def _both(self, tokens: Quantized) -> Tensor:
        between = self.format.up
        return ops.factored_gemm(
            *tokens,
            self.down.prepare(),
            self.up.prepare(),
            self.out_features,
            act_bits=self.format.down.act_bits,
            rank_bits=between.act_bits,
            clip=between.clip,
            hadamard=between.hadamard,
            diag=self.up.diag,
            left=self.up.left,
            right=self.up.right,
            bias=self.up.bias,
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.format.rank}"
