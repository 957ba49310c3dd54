"""lowbit_gemm with transform_quantize against onnxruntime, torch and the machine's peaks.

Our time is that of a whole linear layer: f32 tokens times a diagonal, Hadamard rotation in blocks
of 64, rounding to 4 bits, the product in groups of 128, f32 out. Peers get the same f32 tokens
(torch: bf16) and weights in the same groups; all of them round activations to 8 bits or not at all.

Keys, each peer time / our time unless named otherwise, K = N = 4096 (K = 4096, N = 11008 with that
suffix), two threads: w4_m1_vs_ort (>= 1.0), w4_m1_share_of_dram (>= 0.85; bytes of the weight over
our time, over the rate at which memory is read in the same rounds), w2_m1_vs_ort (>= 1.15),
w4_m8_vs_ort (>= 1.8), w4_m512_vs_ort (>= 1.7), w4_m512_share_of_vnni_peak (>= 0.70),
w2_m512_vs_ort (>= 1.6), avx2_w4a4_vs_int8_maddubs (>= 1.3; M = 64, integers in), and
transform_share_m512 (<= 0.10). "channel" in a key: one group of K.
"""

from __future__ import annotations

import ctypes
from functools import partial

import harness
import peers
import torch
from harness import Native, Report, Rounds, Variant, copies_past_l3, interleave

from saltire.ops import (
    best_isa,
    force_isa,
    lowbit_gemm,
    pack_weight,
    prepack_weight,
    transform_quantize,
)

HADAMARD = 64
ACT_BITS = 4


class Layer:
    """Random weights of one format in several copies, and tokens for them."""

    def __init__(self, M: int, N: int, K: int, bits: int, group: int) -> None:
        self.M, self.N, self.K, self.bits, self.group = M, N, K, bits, group
        self.G = group or K
        bytes_each = N * K * bits // 8
        self.codes = [
            torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
            for _ in range(copies_past_l3(bytes_each))
        ]
        self.packed = [pack_weight(codes, bits) for codes in self.codes]
        self.scale = torch.rand(N, K // self.G) / 64
        self.prepacked = [
            prepack_weight(packed, self.scale.half(), None, bits, group) for packed in self.packed
        ]
        self.x = torch.randn(M, K)
        self.diag = torch.rand(K) + 0.5

    @property
    def bytes(self) -> int:
        return self.prepacked[0].numel()

    @property
    def operations(self) -> int:
        return 2 * self.M * self.N * self.K

    def transform(self, turn: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return transform_quantize(
            self.x, ACT_BITS, diag=self.diag, hadamard=HADAMARD, sum_group=self.G
        )

    def product(self, tokens: tuple[torch.Tensor, ...], turn: int) -> torch.Tensor:
        weight = self.prepacked[turn % len(self.prepacked)]
        return lowbit_gemm(*tokens, weight, self.N, self.bits, self.group, act_bits=ACT_BITS)

    def ours(self) -> Variant:
        return Variant("saltire", lambda turn: self.product(self.transform(), turn))

    def onnxruntime(self) -> Variant | None:
        block = self.group or 128
        scale = self.scale.expand(-1, self.K // block) if not self.group else self.scale
        return peers.onnxruntime_matmul_nbits(self.x, self.packed, scale, self.bits, block)


def measure(report: Report, layer: Layer, others: list[Variant | None], seconds: float) -> Rounds:
    """Interleave our layer with the others and report each."""
    tokens = layer.transform()
    variants = [
        layer.ours(),
        Variant("transform alone", layer.transform),
        Variant("product alone", partial(layer.product, tokens)),
        *(other for other in others if other is not None),
    ]
    calls = max(1, 24 // layer.M)
    rounds = interleave(variants, seconds, calls)
    group = f"g{layer.group}" if layer.group else "channel"
    case = f"w{layer.bits} {group} M={layer.M} K={layer.K} N={layer.N}"
    for timing in rounds.timings.values():
        figures = {}
        if timing.name != "transform alone":
            figures["gops"] = layer.operations / timing.median / 1e9
        if timing.name in ("saltire", "product alone"):
            figures["gb_per_s"] = layer.bytes / timing.median / 1e9
        report.row(case, timing, **figures)
    return rounds


def share_of_peak(
    report: Report, native: Native, layer: Layer, name: str, suffix: str, seconds: float
) -> None:
    """Our layer against what bounds it: reading memory at M = 1, VNNI at M = 512.

    In rounds of their own, because onnxruntime's threads go on spinning beside whatever is next.
    """
    if layer.M == 1:
        peak, key = native.dram(), "share_of_dram"
        share = layer.bytes / native.dram_bytes
    elif layer.M == 512 and native.has_vnni:
        peak, key = native.vnni(), "share_of_vnni_peak"
        share = layer.operations / native.vnni_operations
    else:
        return
    rounds = interleave([layer.ours(), peak], seconds, max(1, 24 // layer.M))
    report.row(f"{name}{suffix} peak", rounds[peak.name])
    report.key(f"{name}_{key}{suffix}", share * rounds.ratio(peak.name, "saltire"))


def measure_shape(report: Report, native: Native, N: int, K: int, seconds: float) -> None:
    """Decode, a small batch and prefill of one layer in every width."""
    suffix = "" if N == K else f"_k{K}_n{N}"
    torch_seconds = 0.0 if report.quick else seconds
    for bits, group in ((4, 128), (2, 128), (8, 128), (4, 0), (2, 0)):
        name = f"w{bits}" + ("" if group else "_channel")
        for M in (1, 8, 512):
            if not group and M == 8:
                continue
            layer = Layer(M, N, K, bits, group)
            rounds = measure(report, layer, [layer.onnxruntime() if group else None], seconds)
            if "onnxruntime" in rounds:
                ratio = rounds.ratio("onnxruntime", "saltire")
                report.key(f"{name}_m{M}_vs_ort{suffix}", ratio)
            if M == 512 and bits == 4 and group:
                share = 1 / rounds.ratio("saltire", "transform alone")
                report.key(f"transform_share_m512{suffix}", share)
            share_of_peak(report, native, layer, f"{name}_m{M}", suffix, seconds / 2)
            if torch_seconds and bits == 4 and group:
                copies = copies_past_l3(2 * N * K)
                slow = [peers.torch_int4pack(layer.x, layer.codes, group)]
                slow.append(peers.torch_bf16(layer.x, N, copies))
                rounds = measure(report, layer, slow, torch_seconds)
                for peer in ("int4pack", "bf16"):
                    ratio = rounds.ratio(f"torch {peer}", "saltire")
                    report.key(f"{name}_m{M}_vs_{peer}{suffix}", ratio)


def measure_avx2(report: Report, native: Native, seconds: float) -> None:
    """What sums in 16 bits bring: the AVX2 kernel against the usual loop over 8-bit integers."""
    M, N, K = 64, 4096, 4096
    x = torch.randint(-7, 8, (M, K), dtype=torch.int8)
    w = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    out = torch.empty(M, N, dtype=torch.int32)
    blocks = N // 16
    # The loop's own layouts; harness.Native says which.
    w_tiles = w.reshape(blocks, 16, K // 4, 4).transpose(1, 2).contiguous()
    x_tiles = x.reshape(M // 4, 4, K // 4, 4).transpose(1, 2).contiguous()

    def part(thread: int) -> None:
        begin, end = (blocks * (thread + i) // native.threads for i in (0, 1))
        sizes = [ctypes.c_int64(size) for size in (M, N, K, begin, end)]
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (w_tiles, x_tiles, out)]
        native.library.int8_maddubs(*pointers, *sizes)

    native.on_all_threads(part)
    if not torch.equal(out, (x.float() @ w.float().T).int()):
        raise RuntimeError("the baseline computes a wrong product")
    variants = [Variant("int8 maddubs", lambda _: native.on_all_threads(part))]
    layers = {}
    for group in (0, 128):
        layer = Layer(M, N, K, 4, group)
        tokens = (x, torch.ones(M), x.int().reshape(M, -1, layer.G).sum(-1, dtype=torch.int32))
        name = f"saltire avx2 g{group}" if group else "saltire avx2 channel"
        variants.append(Variant(name, partial(layer.product, tokens)))
        layers[name] = layer
    with force_isa("avx2"):
        rounds = interleave(variants, seconds)
    for timing in rounds.timings.values():
        report.row(f"avx2 M={M} K={K} N={N}", timing, gops=2 * M * N * K / timing.median / 1e9)
    report.key("avx2_w4a4_vs_int8_maddubs", rounds.ratio("int8 maddubs", "saltire avx2 channel"))
    report.key("avx2_w4a4_g128_vs_int8_maddubs", rounds.ratio("int8 maddubs", "saltire avx2 g128"))


def main() -> None:
    options = harness.arguments(__doc__)
    report = Report("lowbit_gemm", options.quick)
    native = Native()
    seconds = 1.2 if options.quick else 4.0
    torch.manual_seed(0)
    measure_shape(report, native, 4096, 4096, seconds)
    if not options.quick:
        measure_shape(report, native, 11008, 4096, seconds)
    if best_isa() in ("avx2", "avx512"):
        measure_avx2(report, native, seconds)
    report.finish()


if __name__ == "__main__":
    main()
