"""A linear layer of low-bit weights on low-bit activations, run by Saltire's kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saltire import ops
from saltire.nn.linear_format import SCALE_DTYPES, LinearFormat
from saltire.reference.lowbit_gemm import CONTAINER_BITS, dequantize_weight

Quantized = tuple[Tensor, Tensor, Tensor]


class SharedInput:
    """Remembers the last quantised input, so that layers fed by one tensor quantise it once.

    q, k and v (and gate and up) read the same tensor and have the same transform. The key is the
    tensor itself and its version, so a changed or another tensor never hits.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Quantized] | None = None

    def get(self, x: Tensor, compute: Callable[[Tensor], Quantized]) -> Quantized:
        """``compute(x)``, or what it gave when it was last called with this very tensor."""
        version = 0 if x.is_inference() else x._version
        last = self._last
        if last is not None and last[0]() is x and last[1] == version:
            return last[2]
        result = compute(x)
        self._last = (weakref.ref(x), version, result)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedInput:
        return memo.setdefault(id(self), SharedInput())

    def __getstate__(self) -> dict[str, Any]:
        return {"_last": None}


class QuantLinear(nn.Module):
    """``y = Q(T(x)) · Q(W)ᵀ + (x·L)·R + b`` with T a diagonal and a rotation.

    x: float [..., K] -> [..., N] in x's dtype. Weights are kept once: in the checkpoint layout
    until the first forward, then in the layout that its device's kernels read; ``state_dict``
    always gives the checkpoint layout. Buffers: weight_packed uint8 [N, K·c/8]; weight_scale
    [N, K/G]; weight_zero the same, if the format has zero points; diag float32 [K]; left [A, A];
    right [B, B]; low_rank_in float32 [K, R]; low_rank_out float32 [R, N]; bias float32 [N].

    With ``format.rank_bits`` under 32 the branch is stored as ``branch_in`` [R, K·b/8], in the
    basis of T(x), and ``branch_out`` [N, R·b/8]: float16, or codes with a scale a row
    (``branch_in_scale``, ``branch_out_scale``). ``prepare`` decodes low_rank_in and low_rank_out
    from them.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero: Tensor | None
    diag: Tensor | None
    left: Tensor | None
    right: Tensor | None
    low_rank_in: Tensor | None
    low_rank_out: Tensor | None
    bias: Tensor | None
    branch_in: Tensor | None
    branch_out: Tensor | None
    branch_in_scale: Tensor | None
    branch_out_scale: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, format: LinearFormat, bias: bool = False
    ) -> None:
        super().__init__()
        format.check_fits("QuantLinear", in_features)
        self.in_features, self.out_features, self.format = in_features, out_features, format
        K, N = in_features, out_features
        groups = K // (format.group or K)
        scale_dtype = SCALE_DTYPES[format.scale_dtype]
        f32 = torch.float32
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {
            "weight_packed": ((N, K * CONTAINER_BITS[format.weight_bits] // 8), torch.uint8),
            "weight_scale": ((N, groups), scale_dtype),
            "weight_zero": ((N, groups), scale_dtype) if format.zero_points else None,
            "diag": ((K,), f32) if format.diag else None,
            "left": ((format.left, format.left), f32) if format.left else None,
            "right": ((format.right, format.right), f32) if format.right else None,
            "bias": ((N,), f32) if bias or format.bias else None,
            **_branch_shapes(K, N, format),
        }
        decoded = format.rank_bits < 32  # then these are not stored
        for name, shape in shapes.items():
            buffer = None if shape is None else torch.zeros(shape[0], dtype=shape[1])
            persistent = not (decoded and name in ("low_rank_in", "low_rank_out"))
            self.register_buffer(name, buffer, persistent=persistent)
        self.shared_input: SharedInput | None = None
        self._prepacked: Tensor | None = None  # then weight_packed and scales are empty

    def quantize_input(self, x: Tensor) -> Quantized:
        """Codes [M, K], scales [M] and sums for the GEMM, M all tokens of x [..., K]."""
        format = self.format
        return ops.transform_quantize(
            x.reshape(-1, self.in_features),
            format.act_bits,
            diag=self.diag,
            hadamard=format.hadamard,
            left=self.left,
            right=self.right,
            clip=format.clip,
            sum_group=format.group,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(self.quantized(x), x.dtype, x)
        return y.view(*x.shape[:-1], self.out_features)

    def quantized(self, x: Tensor) -> Quantized:
        """``quantize_input``, or what another layer that shares the input made of it."""
        if self.shared_input is None:
            return self.quantize_input(x)
        return self.shared_input.get(x, self.quantize_input)

    def multiply(self, tokens: Quantized, out_dtype: torch.dtype, x: Tensor) -> Tensor:
        """The layer's product from quantised tokens, out_dtype [M, N]; the branch, if there is one,
        reads x itself."""
        weight = self.prepare()
        low_rank_x = None
        if self.low_rank_in is not None:
            low_rank_x = x.reshape(-1, self.in_features).float() @ self.low_rank_in
        return ops.lowbit_gemm(
            *tokens,
            weight,
            self.out_features,
            self.format.weight_bits,
            self.format.group,
            act_bits=self.format.act_bits,
            out_dtype=out_dtype,
            bias=self.bias,
            low_rank_x=low_rank_x,
            low_rank_w=self.low_rank_out,
        )

    def prepare(self) -> Tensor:
        """Lay the weights out for this device's kernels, once; returns that layout."""
        if self._prepacked is None:
            self._prepacked = ops.prepack_weight(
                self.weight_packed,
                self.weight_scale,
                self.weight_zero,
                self.format.weight_bits,
                self.format.group,
            )
            for name in ("weight_packed", "weight_scale", "weight_zero"):
                buffer = getattr(self, name)
                if buffer is not None:
                    setattr(self, name, buffer.new_empty(0))
        if self.branch_in is not None and self.low_rank_in is None:
            self._decode_branch()
        return self._prepacked

    def _decode_branch(self) -> None:
        """Take the stored factors to float32, the first back into the basis of x."""
        assert self.branch_in is not None
        assert self.branch_out is not None
        bits = self.format.rank_bits
        down = self.before_rotation(decode_rows(self.branch_in, self.branch_in_scale, bits))
        down = down if self.diag is None else down * self.diag
        self.low_rank_in = down.T.contiguous()
        self.low_rank_out = decode_rows(self.branch_out, self.branch_out_scale, bits).T.contiguous()

    def before_rotation(self, rows: Tensor) -> Tensor:
        """Rows L of a factor that reads T(x) = (x ∘ d)·O, as L·Oᵀ: T(x)·Lᵀ = (x ∘ d)·(L·Oᵀ)ᵀ."""
        left, right = (None if m is None else m.T.contiguous() for m in (self.left, self.right))
        return ops.transform(rows, hadamard=self.format.hadamard, left=left, right=right)

    def checkpoint_weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The packed codes, scales and zero points in the checkpoint layout."""
        if self._prepacked is None:
            return self.weight_packed, self.weight_scale, self.weight_zero
        packed, scale, zero = ops.unprepack_weight(
            self._prepacked,
            self.out_features,
            self.in_features,
            self.format.weight_bits,
            self.format.group,
            has_zero=self.format.zero_points,
            scale_dtype=SCALE_DTYPES[self.format.scale_dtype],
        )
        return packed, scale, zero

    def dequantized_weight(self) -> Tensor:
        """The weight that the codes stand for, in the transformed basis: float64 [N, K]."""
        packed, scale, zero = self.checkpoint_weight()
        return dequantize_weight(packed, scale, zero, self.format.weight_bits, self.format.group)

    def _release(self) -> None:
        """Go back to the checkpoint layout."""
        if self._prepacked is not None:
            weight = self.checkpoint_weight()
            self._prepacked = None
            self.weight_packed, self.weight_scale, self.weight_zero = weight

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = zip(
            ("weight_packed", "weight_scale", "weight_zero"), self.checkpoint_weight(), strict=True
        )
        destination.update({prefix + name: tensor for name, tensor in weight if tensor is not None})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._release()
        if self.branch_in is not None:
            self.low_rank_in = self.low_rank_out = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Move, but never change a dtype: scales and diagonals keep the one they were made in."""
        w = self._prepacked
        if w is not None and fn(w.new_empty(0)).device != w.device:
            self._release()  # every kind of device has a layout of its own

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        f = self.format
        group = f", group={f.group}" if f.group else ""
        return f"{self.in_features}, {self.out_features}, W{f.weight_bits}A{f.act_bits}{group}"


def encode_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Store float32 [rows, n] in 16, 8 or 4 bits; the latter two with one scale a row, float32.

    Rounds to nearest, on symmetric codes -Q..Q, Q = 2**(bits-1) - 1. 4 bits: uint8 [rows, n/2],
    each code + 8, the first of two in the low half.
    """
    if bits == 16:
        return weight.half(), None
    Q = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(1) / Q
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return encode_codes((weight / scale[:, None]).round().clamp(-Q, Q), bits), scale


def encode_codes(codes: Tensor, bits: int) -> Tensor:
    """Integers [rows, n] in -Q - 1..Q, stored in 8 or 4 bits."""
    if bits == 8:
        return codes.to(torch.int8)
    return ops.pack_weight((codes + 8).to(torch.uint8), 4)


def decode_rows(stored: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    """The inverse of ``encode_rows``: float32 [rows, n]."""
    if bits == 16 or scale is None:
        return stored.float()
    codes = ops.unpack_weight(stored, 4).float() - 8 if bits == 4 else stored.float()
    return codes * scale[:, None]


def _branch_shapes(
    K: int, N: int, format: LinearFormat
) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    R, bits = format.rank, format.rank_bits
    f32 = torch.float32
    plain = R > 0 and bits == 32
    dtype = {4: torch.uint8, 8: torch.int8}.get(bits, torch.float16)
    stored, scaled = R > 0 and bits < 32, R > 0 and bits < 16
    per = 2 if bits == 4 else 1  # codes of a byte
    return {
        "low_rank_in": ((K, R), f32) if plain else None,
        "low_rank_out": ((R, N), f32) if plain else None,
        "branch_in": ((R, K // per), dtype) if stored else None,
        "branch_out": ((N, R // per), dtype) if stored else None,
        "branch_in_scale": ((R,), f32) if scaled else None,
        "branch_out_scale": ((N,), f32) if scaled else None,
    }
