"""A quantised linear whose scales, diagonal and bias can be learned, run by the integer kernels.

The codes stay what they are, so what is learned costs nothing when the model runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from saltire import ops
from saltire.nn.linear_format import SCALE_DTYPES
from saltire.nn.quant_linear import QuantLinear
from saltire.quant.learning.tuned_branch import TunedBranch
from saltire.reference.lowbit_gemm import SYMMETRIC_ZERO

PART = 128  # rows that a backward pass takes at once


class TunedInput(nn.Module):
    """Transforms and rounds what linears of a group share; learns log D.

    Gives (codes, scale, sums) and x̂, float32 [M, K], through which gradients return to x and D.
    """

    def __init__(self, like: QuantLinear) -> None:
        super().__init__()
        self.format, self.left, self.right = like.format, like.left, like.right
        diag = torch.ones(like.in_features) if like.diag is None else like.diag
        self.log_diag = nn.Parameter(diag.log(), requires_grad=like.diag is not None)
        self._last: tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]] | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        rounded = _RoundInput.apply(x.flatten(0, -2), self.log_diag.exp(), self)
        self._last = (x, rounded)
        return rounded

    def forget(self) -> None:
        """Let go of the last input; to be called between steps."""
        self._last = None


class _RoundInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, diag: Tensor, how: TunedInput) -> tuple[Tensor, ...]:
        f = how.format
        codes, scale, sums = ops.transform_quantize(
            x,
            f.act_bits,
            diag=diag,
            hadamard=f.hadamard,
            left=how.left,
            right=how.right,
            clip=f.clip,
            sum_group=f.group,
        )
        ctx.save_for_backward(x, diag, scale)
        ctx.how = how
        ctx.mark_non_differentiable(codes, scale, sums)
        return codes.float().mul_(scale[:, None]), codes, scale, sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, diag, scale = ctx.saved_tensors
        how: TunedInput = ctx.how
        f = how.format
        left, right = (None if m is None else m.T.contiguous() for m in (how.left, how.right))
        dx, d_diag = torch.empty_like(x), torch.zeros_like(diag)
        for rows in _parts(len(x)):
            part, dy = x[rows], gradients[0][rows]
            if f.clip < 1:
                # A clipped value does not move its code; the scale is taken as given.
                y = ops.transform(
                    part, diag=diag, hadamard=f.hadamard, left=how.left, right=how.right
                )
                top = scale[rows, None] * (2 ** (f.act_bits - 1) - 0.5)
                dy = torch.where(y.abs_() <= top, dy, 0.0)
            dz = ops.transform(dy, hadamard=f.hadamard, left=left, right=right)
            torch.mul(dz, diag, out=dx[rows])
            d_diag += dz.mul_(part).sum(0)
        return dx, d_diag, None


class TunedLinear(nn.Module):
    """``y = x̂ · (scale ∘ (codes - zero))ᵀ + branch(x) + bias``; learns log of the scales, and the
    bias.

    Backward passes run on the integer kernels too where a scale spans a whole row: the gradient of
    the outputs, times the scales, is rounded to 8 bits a token and multiplied by the codes.
    """

    def __init__(self, like: QuantLinear, shared: TunedInput, learn_bias: bool) -> None:
        super().__init__()
        packed, scale, zero = like.checkpoint_weight()
        self.format = like.format
        self.in_features, self.out_features = like.in_features, like.out_features
        self.shared, self.packed, self.zero = shared, packed, zero
        self.scale_dtype = scale.dtype
        self.log_scale = nn.Parameter(scale.float().log())
        bias = like.bias
        self.bias = nn.Parameter(
            torch.zeros(like.out_features) if bias is None else bias.clone(),
            requires_grad=learn_bias,
        )
        self.has_bias = learn_bias or bias is not None
        self.branch = None if like.branch_in is None else TunedBranch(like)
        self._transposed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        rounded, codes, scale, sums = self.shared(x)
        bias = self.bias if self.has_bias else None
        y = _Product.apply(rounded, self.log_scale.exp(), bias, (codes, scale, sums), self)
        if self.branch is not None:
            y = y + self.branch(x.flatten(0, -2), self.shared.log_diag.exp())
        return y.view(*x.shape[:-1], self.out_features)

    def centred(self) -> Tensor:
        """codes - zero: float32 [N, K]."""
        f = self.format
        codes = ops.unpack_weight(self.packed, f.weight_bits).float()
        if self.zero is None:
            return codes.sub_(SYMMETRIC_ZERO[f.weight_bits])
        zero = self.zero.float()[..., None]
        return (codes.view(*zero.shape[:-1], -1) - zero).view_as(codes)

    def transposed(self) -> Tensor:
        """The codes as a weight from outputs to inputs, with scales of one, for the kernels."""
        if self._transposed is None:
            codes = ops.unpack_weight(self.packed, self.format.weight_bits).T.contiguous()
            packed = ops.pack_weight(codes, self.format.weight_bits)
            ones = torch.ones(self.in_features, 1)
            self._transposed = ops.prepack_weight(packed, ones, None, self.format.weight_bits, 0)
        return self._transposed

    def result(self) -> QuantLinear:
        """The quantised linear with what was learned, rounded to what is stored."""
        format = replace(self.format, bias=self.has_bias)
        new = QuantLinear(self.in_features, self.out_features, format, bias=self.has_bias)
        new.weight_packed, new.weight_zero = self.packed, self.zero
        new.weight_scale = self.log_scale.detach().exp().to(self.scale_dtype)
        new.diag = self.shared.log_diag.detach().exp() if format.diag else None
        new.left, new.right = (
            None if m is None else m.clone() for m in (self.shared.left, self.shared.right)
        )
        new.bias = self.bias.detach().clone() if self.has_bias else None
        if self.branch is not None:
            self.branch.put_into(new)
        return new


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rounded: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        tokens: tuple[Tensor, ...],
        layer: TunedLinear,
    ) -> Tensor:
        f, (codes, x_scale, sums) = layer.format, tokens
        weight = ops.prepack_weight(
            layer.packed, scale.to(SCALE_DTYPES[f.scale_dtype]), layer.zero, f.weight_bits, f.group
        )
        y = ops.lowbit_gemm(
            codes, x_scale, sums, weight, layer.out_features, f.weight_bits, f.group,
            act_bits=f.act_bits, bias=bias, out_dtype=torch.float32,
        )  # fmt: skip
        ctx.layer = layer
        ctx.on_codes = scale.shape[1] == 1 and layer.zero is None and layer.out_features % 32 == 0
        ctx.save_for_backward(codes, x_scale, scale, bias, y if ctx.on_codes else None)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, x_scale, scale, bias, y = ctx.saved_tensors
        layer: TunedLinear = ctx.layer
        dy = gradients[0].contiguous()
        d_bias = None if bias is None else dy.sum(0)
        if ctx.on_codes:
            dx = torch.empty(codes.shape, dtype=torch.float32)
            d_scale = torch.zeros(layer.out_features)
            weight, bits = layer.transposed(), layer.format.weight_bits
            for rows in _parts(len(dy)):
                part = dy[rows]
                d_scale += (part * y[rows]).sum(0)
                back = ops.transform_quantize(part, 8, diag=scale[:, 0])
                dx[rows] = ops.lowbit_gemm(
                    *back, weight, layer.in_features, bits, 0, act_bits=8, out_dtype=torch.float32
                )
            if bias is not None:
                d_scale -= d_bias * bias  # y holds the bias
            return dx, (d_scale / scale[:, 0])[:, None], d_bias, None, None
        grouped = layer.centred().view(layer.out_features, scale.shape[1], -1)
        d_weight = dy.T @ (codes.float().mul_(x_scale[:, None]))
        d_scale = (d_weight.view_as(grouped) * grouped).sum(-1)
        dx = dy @ (grouped * scale[..., None]).flatten(1)
        return dx, d_scale, d_bias, None, None


def _parts(rows: int) -> list[slice]:
    """The rows in pieces that stay in a core's cache while several operations pass over them."""
    return [slice(start, start + PART) for start in range(0, rows, PART)]
