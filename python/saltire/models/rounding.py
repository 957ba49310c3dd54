"""A low-bit form of a model in seconds: weights rounded to nearest, nothing calibrated.

Good enough to draft for that model, which verifies every token; ``saltire.quant`` makes models that
stand alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saltire import ops
from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder
from saltire.nn.decoder import Decoder
from saltire.nn.linear_format import LinearFormat
from saltire.nn.quant_linear import QuantLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHRINK = (1.0, 0.93, 0.86, 0.79)  # shares of a group's range that the grid may cover
ROWS_AT_ONCE = 8192


def rounded_decoder(model: PreTrainedModel, bits: int = 4, group: int = 32) -> Decoder:
    """A decoder of the model's weights at ``bits`` in groups with zero points, activations at 8.

    bits: 2 or 4. group: 32, 64 or 128. Embedding and norms are the model's own. Raises SaltireError
    for a model that the decoder cannot run or whose widths the group does not divide.
    """
    format = LinearFormat(
        weight_bits=bits, act_bits=8, group=group, zero_points=True, scale_dtype="float16"
    )

    def linear(name: str, module: nn.Module) -> nn.Module:
        if not isinstance(module, nn.Linear):
            raise SaltireError(
                f"{name} is a {type(module).__name__}; rounding starts from nn.Linear. Give the "
                "draft as a model of its own."
            )
        return round_linear(module, format)

    return build_decoder(model, linear)


@torch.no_grad()
def round_linear(module: nn.Linear, format: LinearFormat) -> QuantLinear:
    """A linear rounded to nearest, each group on the grid that loses least."""
    N, K = module.weight.shape
    new = QuantLinear(K, N, format, bias=module.bias is not None)
    parts = [
        _round_rows(rows.float(), format) for rows in module.weight.detach().split(ROWS_AT_ONCE)
    ]
    new.weight_packed = torch.cat([part[0] for part in parts])
    new.weight_scale = torch.cat([part[1] for part in parts])
    new.weight_zero = torch.cat([part[2] for part in parts])
    new.bias = None if module.bias is None else module.bias.detach().float()
    return new


def _round_rows(weight: Tensor, format: LinearFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, scales and zero points of weights f32 [N, K]: of some grids that cover less
    than a group's range, the one with the least squared error."""
    levels = 2**format.weight_bits - 1
    grouped = weight.view(weight.shape[0], -1, format.group)
    low, high = grouped.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0), high.clamp(min=0)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    least = torch.full_like(low, torch.inf)
    for share in SHRINK:
        scale = ((high - low) * share / levels).clamp(min=1e-6).half().float()
        zero = (-low * share / scale).round().half().float()
        codes = (grouped / scale + zero).round().clamp(0, levels)
        lost = ((codes - zero) * scale - grouped).square().sum(-1, keepdim=True)
        better = lost < least
        least = torch.where(better, lost, least)
        if best is None:
            best = codes, scale, zero
        else:
            codes, scale, zero = (
                torch.where(better, new, old)
                for new, old in zip((codes, scale, zero), best, strict=True)
            )
            best = codes, scale, zero
    assert best is not None
    codes, scale, zero = best
    packed = ops.pack_weight(codes.view_as(weight).to(torch.uint8), format.weight_bits)
    return packed, scale.squeeze(-1).half(), zero.squeeze(-1).half()
