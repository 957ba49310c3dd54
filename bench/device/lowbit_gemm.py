"""lowbit_gemm on the device, against torch's bf16 product of the same shape (cuBLAS).

Decode: weights rotate past the L2, activations are quantised beforehand, M = 1, 2, 4, 16, 64.
Prefill: bf16 tokens to bf16 outputs, the transform included. Weights are random: nothing in a
kernel's time depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from bench.device import report
from bench.device.timing import Timing, copies_past_l2, time_turns
from saltire.ops import lowbit_gemm, pack_weight, prepack_weight, transform_quantize

BF16 = torch.bfloat16
DECODE_SHAPES = [(14336, 4096), (28672, 8192), (4096, 14336), (4096, 4096)]  # N, K
PREFILL = (4096, 8192, 8192)  # M, N, K


@dataclass
class Layer:
    """Copies of one random weight, enough to rotate past the L2."""

    N: int
    K: int
    bits: int
    group: int
    weights: list[torch.Tensor]

    @classmethod
    def random(cls, N: int, K: int, bits: int, group: int) -> Layer:
        codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device="cuda")
        scale = (torch.rand(N, K // (group or K), device="cuda") / 64).half()
        w = prepack_weight(pack_weight(codes, bits), scale, None, bits, group)
        return cls(N, K, bits, group, [w.clone() for _ in range(copies_past_l2(w.numel()))])

    @property
    def bytes(self) -> int:
        return self.weights[0].numel()

    def multiply(self, tokens: tuple[torch.Tensor, ...], turn: int, act_bits: int) -> torch.Tensor:
        return lowbit_gemm(
            *tokens, self.weights[turn], self.N, self.bits, self.group, act_bits=act_bits,
            out_dtype=BF16,
        )  # fmt: skip


def quantise(x: torch.Tensor, act_bits: int, group: int) -> tuple[torch.Tensor, ...]:
    return transform_quantize(x, act_bits, hadamard=64, sum_group=group)


def bf16_times(N: int, K: int, tokens: list[int]) -> dict[int, Timing]:
    """cuBLAS on rotating bf16 weights, for each M."""
    weights = [
        torch.randn(N, K, device="cuda").to(BF16) / 64 for _ in range(copies_past_l2(2 * N * K))
    ]
    times = {}
    for M in tokens:
        x = torch.randn(M, K, device="cuda").to(BF16)
        times[M] = time_turns(lambda i, x=x: x @ weights[i].T, len(weights))
        report.row(f"N={N} K={K} M={M}", "torch bf16", times[M].seconds, times[M].spread)
    return times


OVER_BF16 = {2: 5.0, 4: 3.3, 8: 1.8}  # at one token, docs/cuda.md


def decode(N: int, K: int) -> None:
    """Every width at every M against bf16; the figures are those of the large shapes."""
    bandwidth = report.ceiling("copy_bytes_per_s")
    bf16 = bf16_times(N, K, [1, 2, 4, 16, 64])
    large = N * K >= 4096 * 14336
    for bits, group, act_bits in (
        (4, 128, 4), (4, 128, 8), (4, 0, 4), (2, 64, 4), (2, 0, 4), (8, 0, 8),
    ):  # fmt: skip
        layer = Layer.random(N, K, bits, group)
        name = f"w{bits}a{act_bits} {f'g{group}' if group else 'channel'}"
        for M, dense in bf16.items():
            x = torch.randn(M, K, device="cuda").to(BF16)
            tokens = quantise(x, act_bits, group)
            timing = time_turns(
                lambda i, t=tokens, w=layer, a=act_bits: w.multiply(t, i, a), len(layer.weights)
            )
            share = layer.bytes / timing.seconds / bandwidth
            ratio = dense.seconds / timing.seconds
            report.row(
                f"N={N} K={K} M={M}", name, timing.seconds, timing.spread,
                share_of_copy=round(share, 3), times_bf16=round(ratio, 3),
            )  # fmt: skip
            if not large or M not in (1, 16):
                continue
            at = f"{name} {N}x{K} m{M}"
            if M == 16 and bits == 4:
                report.figure(f"{at} vs bf16", ratio, at_least=3.0, unit="x")
            elif M == 1:
                report.figure(f"{at} vs bf16", ratio, at_least=OVER_BF16[bits], unit="x")
                if bits != 2:
                    report.figure(f"{at} share of copy", share, at_least=0.80)


def bf16_prefill(x: list[torch.Tensor], N: int) -> Timing:
    w = torch.randn(N, x[0].shape[1], device="cuda").to(BF16) / 64
    return time_turns(lambda i: x[i] @ w.T, len(x))


def prefill(group: int, act_bits: int) -> None:
    """A whole layer, transform included, and the transform alone."""
    M, N, K = PREFILL
    x = [torch.randn(M, K, device="cuda").to(BF16) for _ in range(2)]
    bf16 = bf16_prefill(x, N)
    layer = Layer.random(N, K, 4, group)
    whole = time_turns(lambda i: layer.multiply(quantise(x[i], act_bits, group), i, act_bits), 2)
    transform = time_turns(lambda i: quantise(x[i], act_bits, group), 2)
    operations = 2 * M * N * K
    name = f"w4a{act_bits} {f'g{group}' if group else 'channel'} prefill"
    case = f"M={M} N={N} K={K}"
    report.row(case, "torch bf16", bf16.seconds, bf16.spread)
    report.row(case, name, whole.seconds, whole.spread)
    report.row(case, f"{name}: transform", transform.seconds, transform.spread)
    report.figure(f"{name} vs bf16", bf16.seconds / whole.seconds, at_least=1.45, unit="x")
    rate = operations / (whole.seconds - transform.seconds)
    report.figure(
        f"{name} product, share of int8", rate / report.ceiling("int8_ops_per_s"), at_least=0.60
    )
    share = transform.seconds / whole.seconds
    report.figure(f"{name} transform, share of time", share, at_most=0.08)


def main() -> None:
    for N, K in DECODE_SHAPES:
        report.attempt(f"decode N={N} K={K}", partial(decode, N, K))
    for group, act_bits in ((0, 4), (128, 4), (128, 8)):
        report.attempt(f"prefill g{group} a{act_bits}", partial(prefill, group, act_bits))
    report.finish()


if __name__ == "__main__":
    main()
