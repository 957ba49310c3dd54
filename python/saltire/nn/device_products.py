"""Linear layers that read one input, as few products as their formats allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saltire import ops
from saltire.errors import SaltireError
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.linear_format import LinearFormat
from saltire.nn.quant_linear import QuantLinear
from saltire.ops import layer_parts
from saltire.ops.layer_parts import LARGEST_HADAMARD, LONGEST_TOKEN, RUN, Quantized


@dataclass(frozen=True, eq=False)
class Rounding:
    """How a layer's input becomes codes: ``transform_quantize``'s arguments."""

    K: int
    bits: int
    clip: float
    hadamard: int
    sum_group: int
    diag: Tensor | None
    left: Tensor | None
    right: Tensor | None

    @classmethod
    def of(cls, module: QuantLinear) -> Rounding:
        f = module.format
        return cls(
            module.in_features,
            f.act_bits,
            f.clip,
            f.hadamard,
            f.group,
            module.diag,
            module.left,
            module.right,
        )

    def same(self, other: Rounding) -> bool:
        """Whether both make the same codes of one input."""

        def equal(a: Tensor | None, b: Tensor | None) -> bool:
            return a is b if a is None or b is None else torch.equal(a, b)

        plain = ("K", "bits", "clip", "hadamard", "sum_group")
        return all(getattr(self, n) == getattr(other, n) for n in plain) and all(
            equal(getattr(self, n), getattr(other, n)) for n in ("diag", "left", "right")
        )

    def fits_parts(self) -> bool:
        """Whether the kernels that make the input can also round it."""
        group = self.sum_group or self.K
        return (
            self.left is None
            and self.right is None
            and self.hadamard <= LARGEST_HADAMARD
            and self.K <= LONGEST_TOKEN
            and self.K % RUN == 0
            and group % RUN == 0
        )

    def __call__(self, x: Tensor) -> Quantized:
        return ops.transform_quantize(
            x,
            self.bits,
            diag=self.diag,
            hadamard=self.hadamard,
            left=self.left,
            right=self.right,
            clip=self.clip,
            sum_group=self.sum_group,
        )


class Dense:
    """nn.Linears side by side, in ``dtype``."""

    rounding: Rounding | None = None

    def __init__(self, modules: Sequence[nn.Linear], dtype: torch.dtype, device: torch.device):
        # Without a copy where there is one module of that dtype, so that a tied head stays tied.
        weights = [m.weight.detach().to(device, dtype) for m in modules]
        self.weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        biases = [_bias(m, m.out_features, device) for m in modules]
        any_bias = any(m.bias is not None for m in modules)
        self.bias = torch.cat(biases).to(dtype) if any_bias else None
        self.bytes = self.weight.numel() * self.weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Quantised:
    """QuantLinears side by side that round their input alike."""

    def __init__(self, modules: Sequence[QuantLinear], device: torch.device) -> None:
        first = modules[0]
        self.format, self.rounding = first.format, Rounding.of(first)
        self.n = sum(m.out_features for m in modules)
        self.low_rank_in: Tensor | None = None
        self.low_rank_out: Tensor | None = None
        if len(modules) == 1:
            self.weight = first.prepare()
            self.low_rank_in, self.low_rank_out = first.low_rank_in, first.low_rank_out
        else:
            packed, scales, zeros = zip(*(m.checkpoint_weight() for m in modules), strict=True)
            zero = None if zeros[0] is None else torch.cat(zeros)
            f = first.format
            self.weight = ops.prepack_weight(
                torch.cat(packed), torch.cat(scales), zero, f.weight_bits, f.group
            )
        any_bias = any(m.bias is not None for m in modules)
        biases = [_bias(m, m.out_features, device) for m in modules]
        self.bias = torch.cat(biases).float() if any_bias else None
        self.bytes = self.weight.numel()

    @property
    def reads_numbers(self) -> bool:
        """Whether codes of the input are not enough."""
        return self.low_rank_in is not None

    def __call__(self, codes: Quantized, x: Tensor | None, dtype: torch.dtype) -> Tensor:
        low_rank_x = None
        if self.low_rank_in is not None:
            assert x is not None
            low_rank_x = x.float() @ self.low_rank_in
        return ops.lowbit_gemm(
            *codes,
            self.weight,
            self.n,
            self.format.weight_bits,
            self.format.group,
            act_bits=self.format.act_bits,
            out_dtype=dtype,
            bias=self.bias,
            low_rank_x=low_rank_x,
            low_rank_w=self.low_rank_out,
        )


class Factored:
    """A layer of two quantised factors: the ranks are rounded on their way."""

    def __init__(self, module: FactoredQuantLinear, device: torch.device) -> None:
        self.down = Quantised([module.down], device)
        self.up = Quantised([module.up], device)
        self.rounding = self.down.rounding
        self.bytes = self.down.bytes + self.up.bytes

    reads_numbers = False

    def __call__(self, codes: Quantized, x: Tensor | None, dtype: torch.dtype) -> Tensor:
        ranks = self.down(codes, None, torch.float32)
        return self.up(self.up.rounding(ranks), None, dtype)


class Product:
    """All that some linears make of their common input: [M, K] -> dtype [M, N1 + N2 + ...].

    Linears of one format become one weight. What precedes them (a norm, a gate) can be asked for
    with them, so that its kernel hands over codes where these are all that is read.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype = dtype
        self.parts: list[Dense | Quantised | Factored] = []
        for kind, run in _runs(modules):
            if kind == "dense":
                self.parts.append(Dense(run, dtype, device))  # type: ignore[arg-type]
            elif kind == "factored":
                self.parts += [Factored(m, device) for m in run]  # type: ignore[arg-type]
            else:
                self.parts.append(Quantised(run, device))  # type: ignore[arg-type]
        first = self.parts[0].rounding
        for part in self.parts[1:]:  # equal ones become one object: no later call compares tensors
            if first is not None and part.rounding is not None and part.rounding.same(first):
                part.rounding = first
        alike = all(part.rounding is first for part in self.parts)
        # Set where the input is needed as codes alone.
        self.codes_of: Rounding | None = None
        if alike and first is not None and first.fits_parts() and not self._reads_numbers():
            self.codes_of = first

    def _reads_numbers(self) -> bool:
        return any(not isinstance(part, Dense) and part.reads_numbers for part in self.parts)

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(part.bytes for part in self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [M, K] in dtype."""
        outputs: list[Tensor] = []
        last: tuple[Rounding, Quantized] | None = None
        for part in self.parts:
            if isinstance(part, Dense):
                outputs.append(part(x))
                continue
            if last is None or last[0] is not part.rounding:
                last = (part.rounding, part.rounding(x))
            outputs.append(part(last[1], x, self.dtype))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def of_codes(self, codes: Quantized) -> Tensor:
        """From the codes that ``codes_of`` describes."""
        outputs = [
            part(codes, None, self.dtype) for part in self.parts if not isinstance(part, Dense)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def of_norm(
        self,
        state: Tensor,
        delta: Tensor | None,
        gain: Tensor,
        eps: float,
        trace: Tensor | None = None,
    ) -> Tensor:
        """state += delta; the products of its norm."""
        r = self.codes_of
        if r is None:
            if delta is not None and delta.dtype != self.dtype:
                state.add_(delta)
                delta = None
            return self(layer_parts.residual_norm(state, delta, gain, eps, self.dtype, trace))
        codes = layer_parts.residual_norm_quantize(
            state, delta, gain, eps, trace, r.bits, r.diag, r.hadamard, r.clip, r.sum_group
        )
        return self.of_codes(codes)

    def of_gate(self, gate_up: Tensor) -> Tensor:
        """The products of silu(gate) ∘ up."""
        r = self.codes_of
        if r is None:
            return self(layer_parts.swiglu(gate_up))
        codes = layer_parts.swiglu_quantize(
            gate_up, r.bits, r.diag, r.hadamard, r.clip, r.sum_group
        )
        return self.of_codes(codes)


def _runs(modules: Mapping[str, nn.Module]) -> list[tuple[str, list[nn.Module]]]:
    """Neighbours that can share one weight, with their kind."""
    runs: list[tuple[str, list[nn.Module]]] = []
    for name, module in modules.items():
        kind = _kind(name, module)
        if runs and runs[-1][0] == kind and _fuse(runs[-1][1][0], module):
            runs[-1][1].append(module)
        else:
            runs.append((kind, [module]))
    return runs


def _kind(name: str, module: nn.Module) -> str:
    if isinstance(module, FactoredQuantLinear):
        return "factored"
    if isinstance(module, QuantLinear):
        return "quantised"
    if isinstance(module, nn.Linear):
        return "dense"
    raise SaltireError(
        f"{name} is a {type(module).__name__}; the decoder runs nn.Linear, QuantLinear and "
        "FactoredQuantLinear."
    )


def _fuse(a: nn.Module, b: nn.Module) -> bool:
    if isinstance(a, nn.Linear) and isinstance(b, nn.Linear):
        return True
    if not (isinstance(a, QuantLinear) and isinstance(b, QuantLinear)):
        return False
    same = _weight_format(a.format) == _weight_format(b.format)
    branch = a.format.rank or b.format.rank
    return same and not branch and Rounding.of(a).same(Rounding.of(b))


def _weight_format(f: LinearFormat) -> tuple[object, ...]:
    return f.weight_bits, f.group, f.zero_points, f.scale_dtype


def _bias(module: nn.Linear | QuantLinear, n: int, device: torch.device) -> Tensor:
    if module.bias is None:
        return torch.zeros(n, device=device)
    return module.bias.detach().to(device)
