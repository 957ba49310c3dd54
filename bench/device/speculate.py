"""speculate on the device: times of a step's distributions, draws and acceptance, beside torch."""

from __future__ import annotations

from functools import partial

import torch

from bench.device import report
from bench.device.timing import time_turns
from saltire.ops import draw_tokens, speculate_verify, warp_logits

SHAPES = [(1, 49_152), (16, 49_152), (1, 151_936), (16, 151_936)]
TURNS = 8  # logits lie in the L2, where the model's last product leaves them
SETTINGS = {"plain": (0.8, 0, 1.0, 0.0), "top-k 50, top-p 0.95": (0.8, 50, 0.95, 0.0)}


def torch_warp(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The same distribution by sorting."""
    p = (logits / temperature).softmax(-1)
    if top_k:
        p = p.where(p >= p.topk(top_k).values[:, -1:], 0.0)
    if top_p < 1:
        ordered, index = p.sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.where(before < top_p * p.sum(-1, keepdim=True), 0.0)
        p = torch.zeros_like(p).scatter(-1, index, ordered)
    return p / p.sum(-1, keepdim=True)


def distributions(M: int, V: int) -> None:
    logits = [torch.randn(M, V, device="cuda") * 3 for _ in range(TURNS)]
    case = f"M={M} V={V}"
    for name, (temperature, top_k, top_p, min_p) in SETTINGS.items():
        own = time_turns(
            lambda i, s=(temperature, top_k, top_p, min_p): warp_logits(logits[i], *s), TURNS
        )
        peer = time_turns(
            lambda i, s=(temperature, top_k, top_p): torch_warp(logits[i], *s), TURNS, graph=False
        )
        report.row(case, f"warp, {name}", own.seconds, own.spread)
        report.row(case, f"torch, {name}", peer.seconds, peer.spread)
    p = [warp_logits(x) for x in logits]
    index = torch.arange(M, device="cuda")
    drawn = time_turns(lambda i: draw_tokens(p[i], index, index, i), TURNS)
    report.row(case, "draw", drawn.seconds, drawn.spread)


def acceptance(B: int, count: int, V: int) -> None:
    """B sequences of `count` drafts each, what a round of self-speculation ends with."""
    S = B * count
    p = warp_logits(torch.randn(S + B, V, device="cuda"))
    q = warp_logits(torch.randn(S, V, device="cuda"))
    index = torch.arange(S, device="cuda")
    drafts = draw_tokens(q, index, index, 1, draft=True)
    counts = torch.full((B,), count, device="cuda")
    timing = time_turns(
        lambda i: speculate_verify(p, q, drafts, counts, index[:B], index[:B], i), TURNS
    )
    report.row(f"B={B} drafts={count} V={V}", "verify", timing.seconds, timing.spread)


def main() -> None:
    for M, V in SHAPES:
        report.attempt(f"M={M} V={V}", partial(distributions, M, V))
    report.attempt("verify", partial(acceptance, 8, 6, 49_152))
    report.finish()


if __name__ == "__main__":
    main()
