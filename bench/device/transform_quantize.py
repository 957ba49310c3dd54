"""transform_quantize on the device: one pass over the tokens, so its ceiling is copy bandwidth."""

from __future__ import annotations

from functools import partial

import torch

from bench.device import report
from bench.device.timing import copies_past_l2, time_turns
from saltire.ops import transform_quantize

CASES = [(1, 4096), (16, 4096), (4096, 4096), (4096, 8192), (4096, 14336)]


def measure(M: int, K: int, hadamard: int) -> None:
    """bf16 tokens times a diagonal, rotated and rounded to 4 bits, one sum a group of 128."""
    moved = M * K * (2 + 1)
    tokens = [
        torch.randn(M, K, device="cuda").bfloat16() for _ in range(min(64, copies_past_l2(moved)))
    ]
    diag = torch.rand(K, device="cuda") + 0.5
    timing = time_turns(
        lambda i: transform_quantize(tokens[i], 4, diag=diag, hadamard=hadamard, sum_group=128),
        len(tokens),
    )
    case = f"M={M} K={K} hadamard={hadamard} bf16"
    share = moved / timing.seconds / report.ceiling("copy_bytes_per_s")
    report.row(case, "saltire", timing.seconds, timing.spread, share_of_copy=round(share, 3))


def main() -> None:
    for M, K in CASES:
        for hadamard in (64, 512):
            report.attempt(f"M={M} K={K} hadamard={hadamard}", partial(measure, M, K, hadamard))
    report.finish()


if __name__ == "__main__":
    main()
