"""skip_plan on the device: one choice of CLaSp's programme, beside torch's operations for it."""

from __future__ import annotations

from functools import partial

import torch

from bench.device import report
from bench.device.timing import time_turns
from saltire.ops import skip_plan_select

SHAPES = [(15, 576), (16, 4096), (40, 8192)]  # states (numbers of skipped layers), D
TURNS = 16  # states lie in the L2, where the layer's step leaves them


def torch_select(keep: torch.Tensor, skip: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    cosine = torch.nn.functional.cosine_similarity
    with_layer, without = cosine(keep, truth[None]), cosine(skip, truth[None])
    return torch.where((with_layer > without)[:, None], keep, skip)


def measure(M: int, D: int) -> None:
    states = [torch.randn(2, M, D, device="cuda") for _ in range(TURNS)]
    truth = torch.randn(D, device="cuda")
    own = time_turns(lambda i: skip_plan_select(*states[i], truth), TURNS)
    peer = time_turns(lambda i: torch_select(*states[i], truth), TURNS)
    report.row(f"M={M} D={D}", "saltire", own.seconds, own.spread)
    report.row(f"M={M} D={D}", "torch", peer.seconds, peer.spread)
    report.figure(f"M={M} D={D} vs torch", peer.seconds / own.seconds, unit="x")


def main() -> None:
    for M, D in SHAPES:
        report.attempt(f"M={M} D={D}", partial(measure, M, D))
    report.finish()


if __name__ == "__main__":
    main()
