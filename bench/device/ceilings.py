"""What the device can do, measured: copy bandwidth, bf16 and int8 matrix rates, a launch.

Every share in the report is of these numbers, not of a data sheet's.
"""

from __future__ import annotations

import torch

from bench.device import report
from bench.device.timing import time_turns

COPY_BYTES = 1 << 30
SIZE = 8192  # of square matrices


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second, of a large copy."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    timing = time_turns(lambda _: target.copy_(source), 2)
    report.row("ceiling", "copy", timing.seconds, timing.spread, bytes=2 * COPY_BYTES)
    return 2 * COPY_BYTES / timing.seconds


def bf16_rate() -> float:
    """Operations a second of a large bf16 product (random values: zeros would run faster)."""
    a, b = (torch.randn(SIZE, SIZE, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    timing = time_turns(lambda _: torch.matmul(a, b.T, out=out), 2)
    report.row("ceiling", "bf16 matmul", timing.seconds, timing.spread)
    return 2 * SIZE**3 / timing.seconds


def int8_rate() -> float:
    """The same of torch's int8 product."""
    a, b = (torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8, device="cuda") for _ in "ab")
    timing = time_turns(lambda _: torch._int_mm(a, b.T), 2)
    report.row("ceiling", "int8 matmul", timing.seconds, timing.spread)
    return 2 * SIZE**3 / timing.seconds


def main() -> None:
    for name, measure in {
        "copy_bytes_per_s": copy_bandwidth,
        "bf16_ops_per_s": bf16_rate,
        "int8_ops_per_s": int8_rate,
    }.items():
        report.attempt(name, lambda n=name, m=measure: report.figure(n, m()))
    report.finish()


if __name__ == "__main__":
    main()
