"""CLaSp on the paper's large models, by theory: what its accepted lengths imply, against its speed.

A round that emits τ tokens drafts at least τ - 1 of them, and one more where it ends with a token
that is refused or too unsure. With c the time of a drafted token over a plain step, o the share of
time for planning, and verification at the price of one step (one GPU reads the weights once):

    τ·(1 - o) / (τ·c + 1)  <=  speed-up  <=  τ·(1 - o) / ((τ - 1)·c + 1)

c is the share of bytes that a draft reads: kept layers and the head. Published τ and speed-ups:
CLaSp, table 1, greedy. Keys: inside (cells within the bounds), cells, largest_miss.
"""

from __future__ import annotations

import argparse
import json

PLANNING = 0.048  # of a query's time, 70B
# name: (layers, skipped, share of the head's bytes, {task: (τ, speed-up)}). The paper gives M = 44
# of 80 for the 70B; half is taken for the 8B, of which it says 50 to 60%.
MODELS = {
    "Llama-3 70B": (80, 44, 0.015, {
        "MT": (4.55, 1.64), "WMT14": (5.81, 1.69), "CNN/DM": (7.19, 1.66),
        "NQ": (5.37, 1.72), "GSM8K": (6.77, 1.75), "DPR": (4.05, 1.56),
    }),
    "Llama-3 70B Chat": (80, 44, 0.015, {
        "MT": (2.61, 1.35), "WMT14": (4.72, 1.51), "CNN/DM": (3.48, 1.39),
        "NQ": (3.32, 1.39), "GSM8K": (5.28, 1.53), "DPR": (5.61, 1.54),
    }),
    "Llama-3 8B": (32, 16, 0.07, {
        "MT": (3.68, 1.24), "WMT14": (4.14, 1.23), "CNN/DM": (6.22, 1.22),
        "NQ": (4.03, 1.27), "GSM8K": (5.26, 1.26), "DPR": (4.17, 1.22),
    }),
}  # fmt: skip


def bounds(tau: float, cost: float) -> tuple[float, float]:
    """Least and most speed-up of rounds that emit ``tau`` tokens."""
    low = tau * (1 - PLANNING) / (tau * cost + 1)
    return low, tau * (1 - PLANNING) / ((tau - 1) * cost + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="nothing to shorten: it is arithmetic")
    parser.parse_args()
    inside, cells, miss = 0, 0, 0.0
    for name, (layers, skipped, head, tasks) in MODELS.items():
        cost = (1 - skipped / layers) * (1 - head) + head
        print(f"{name}: {skipped} of {layers} skipped, a drafted token costs {cost:.3f} steps")
        for task, (tau, published) in tasks.items():
            low, high = bounds(tau, cost)
            print(f"  {task:7} τ {tau:.2f}: {low:.2f} to {high:.2f}, published {published:.2f}")
            cells += 1
            inside += low <= published <= high
            miss = max(miss, low / published - 1, published / high - 1)
    print(json.dumps({"inside": inside, "cells": cells, "largest_miss": round(miss, 3)}))


if __name__ == "__main__":
    main()
