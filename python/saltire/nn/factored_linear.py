"""A linear layer of two low-bit factors with a few ranks between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saltire.nn.linear_format import FactoredFormat
from saltire.nn.quant_linear import QuantLinear, SharedInput

# Bytes of ranks in float32 at once: with their codes and both factors they stay in the last cache.
INTERMEDIATE_BYTES = 4 << 20


class FactoredQuantLinear(nn.Module):
    """``y = Q(Q(T(x))·Q(down)ᵀ)·Q(up)ᵀ + b``: the ranks are quantised once, on their way.

    x: float [..., K] -> [..., N] in x's dtype. Whatever stands between the factors (DAM's diagonal,
    a rotation) is folded into both, so nothing of it is left here. Many tokens are taken in runs
    whose ranks stay in the cache; runs do not change any value. Buffers: those of two QuantLinears.
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
        run = max(1, INTERMEDIATE_BYTES // (4 * self.format.rank))
        parts = []
        for part in zip(*(t.split(run) for t in tokens), strict=True):
            ranks = self.down.multiply(part, torch.float32, x)
            parts.append(self.up.multiply(self.up.quantize_input(ranks), x.dtype, ranks))
        y = parts[0] if len(parts) == 1 else torch.cat(parts)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.format.rank}"
