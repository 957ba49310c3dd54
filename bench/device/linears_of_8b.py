"""One token through all linear layers of a Llama-3-8B shape, random weights, batch 1.

What a decoder of that shape does beside norms and attention: 32 layers of q·k·v, o, gate·up and
down, each quantising its input, captured as one CUDA graph; against the same in bf16. Its weights
exceed the L2 by far, so every layer comes from memory. Prefill of 512 tokens likewise.
"""

from __future__ import annotations

from functools import partial

import torch

from bench.device import report
from bench.device.timing import Timing, time_turns
from saltire.nn.linear_format import LinearFormat
from saltire.nn.quant_linear import QuantLinear

D, FF, KV, LAYERS = 4096, 14336, 1024, 32
SHAPES = [(D, D + 2 * KV), (D, D), (D, 2 * FF), (FF, D)]  # K, N
BF16 = torch.bfloat16


def random_linear(K: int, N: int, format: LinearFormat) -> QuantLinear:
    """A layer with random codes on the device, laid out for its kernels."""
    with torch.device("cuda"):
        linear = QuantLinear(K, N, format)
        linear.weight_packed.random_(0, 256)
        linear.weight_scale.uniform_(0.001, 0.01)
    linear.prepare()
    return linear


def quantised(format: LinearFormat, M: int) -> Timing:
    layers = [[random_linear(K, N, format) for K, N in SHAPES] for _ in range(LAYERS)]
    inputs = [torch.randn(M, K, device="cuda").to(BF16) for K, _ in SHAPES]

    def step(_: int) -> None:
        for layer in layers:
            for linear, x in zip(layer, inputs, strict=True):
                linear(x)

    with torch.inference_mode():
        return time_turns(step, 1)


def dense(M: int) -> Timing:
    weights = [
        [torch.randn(N, K, device="cuda", dtype=BF16) / 64 for K, N in SHAPES]
        for _ in range(LAYERS)
    ]
    inputs = [torch.randn(M, K, device="cuda").to(BF16) for K, _ in SHAPES]

    def step(_: int) -> None:
        for layer in weights:
            for w, x in zip(layer, inputs, strict=True):
                x @ w.T

    with torch.inference_mode():
        return time_turns(step, 1)


def measure(M: int, formats: dict[str, LinearFormat]) -> None:
    """Every format against bf16; the quotient at M = 1 is a figure."""
    bf16 = dense(M)
    report.row(f"8B linears M={M}", "torch bf16", bf16.seconds, bf16.spread)
    for name, format in formats.items():
        timing = quantised(format, M)
        ratio = bf16.seconds / timing.seconds
        report.row(f"8B linears M={M}", name, timing.seconds, timing.spread,
                   times_bf16=round(ratio, 3))  # fmt: skip
        if M == 1:
            goal = 2.7 if name.startswith("w4a4") else None
            report.figure(f"8B linears, {name} vs bf16, M=1", ratio, at_least=goal, unit="x")


def main() -> None:
    formats = {
        "w4a4 g128": LinearFormat(4, 4, 128, scale_dtype="float16", hadamard=64),
        "w4a8 g128": LinearFormat(4, 8, 128, scale_dtype="float16", hadamard=64),
        "w2a8 g64": LinearFormat(2, 8, 64, scale_dtype="float16", hadamard=64),
    }
    for M in (1, 512):
        report.attempt(f"8B linears M={M}", partial(measure, M, formats))
    report.finish()


if __name__ == "__main__":
    main()
