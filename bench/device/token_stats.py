"""token_stats on the device: from logits against copy bandwidth, from hidden states against the
bf16 matrix rate and against torch's chunked logits."""

from __future__ import annotations

from functools import partial

import torch

from bench.device import report
from bench.device.timing import time_turns
from saltire.ops import linear_token_stats, token_stats

TOKENS, VOCABULARY = 8192, 151_936
LINEAR = (8192, 4096, 131_072)  # tokens, D, V
CHUNK = 1024  # tokens whose logits the torch variant holds


def logits() -> None:
    """8,192 x 151,936 bf16, 2.5 GB: nothing of it is left in the L2 from one turn to the next."""
    x = torch.randn(TOKENS, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device="cuda")
    case, copy = f"M={TOKENS} V={VOCABULARY} bf16", report.ceiling("copy_bytes_per_s")
    bytes_read = x.numel() * 2
    forward = time_turns(lambda _: token_stats(x, labels, check=False), 1)
    share = bytes_read / forward.seconds / copy
    report.row(case, "forward", forward.seconds, forward.spread, share_of_copy=round(share, 3))
    report.figure("forward, share of copy", share, at_least=0.85)
    report.figure("forward", forward.seconds * 1e3, at_most=0.9, unit="ms")
    stats = token_stats(x, labels, check=False)
    ones = torch.ones(TOKENS, device="cuda")
    arguments = (
        x, labels, ones[:1], 0.0, -100, 0, 0, stats.max_logit, stats.log_sum, stats.entropy,
        ones, ones, None,
    )  # fmt: skip
    backward = time_turns(lambda _: torch.ops.saltire.token_stats_backward(*arguments), 1)
    share = 2 * bytes_read / backward.seconds / copy
    report.row(case, "backward", backward.seconds, backward.spread, share_of_copy=round(share, 3))


def torch_forward(hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-prob and entropy with the logits of CHUNK tokens held at a time."""
    found = []
    for h, y in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True):
        log_p = (h @ head.T).float().log_softmax(-1)
        found.append(log_p.gather(-1, y[:, None])[:, 0] - (log_p.exp() * log_p).sum(-1))
    return torch.cat(found)


def linear() -> None:
    """Forward, and forward with all gradients; and the memory that they take beside them."""
    M, D, V = LINEAR
    hidden = torch.randn(M, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    head = (torch.randn(V, D, device="cuda", dtype=torch.bfloat16) / 64).requires_grad_()
    labels = torch.randint(0, V, (M,), device="cuda")
    case, rate = f"M={M} D={D} V={V} bf16", report.ceiling("bf16_ops_per_s")
    operations = 2 * M * D * V

    def forward(_: int) -> torch.Tensor:
        stats = linear_token_stats(hidden.detach(), head.detach(), labels, check=False)
        return stats.entropy

    def full(_: int, weight: torch.Tensor = head) -> None:
        hidden.grad = head.grad = None
        stats = linear_token_stats(hidden, weight, labels, check=False)
        assert stats.logprob is not None
        (stats.logprob + stats.entropy).sum().backward()

    def plain(_: int) -> torch.Tensor:
        with torch.no_grad():
            return torch_forward(hidden, head, labels)

    peer = time_turns(plain, 1, graph=False)
    report.row(case, "torch, chunks of tokens: forward", peer.seconds, peer.spread)
    timing = time_turns(forward, 1)
    report.row(case, "forward", timing.seconds, timing.spread,
               share_of_bf16=round(operations / timing.seconds / rate, 3))  # fmt: skip
    report.figure("linear forward", timing.seconds * 1e3, at_most=12, unit="ms")
    timing = time_turns(full, 1, graph=False)
    report.row(case, "full", timing.seconds, timing.spread,
               share_of_bf16=round(4 * operations / timing.seconds / rate, 3))  # fmt: skip
    report.figure("linear full", timing.seconds * 1e3, at_most=50, unit="ms")
    frozen = head.detach()
    timing = time_turns(partial(full, weight=frozen), 1, graph=False)
    report.row(case, "full, frozen head", timing.seconds, timing.spread,
               share_of_bf16=round(3 * operations / timing.seconds / rate, 3))  # fmt: skip
    hidden.grad = head.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    full(0)
    gradients = (hidden.numel() + head.numel()) * 2
    extra = torch.cuda.max_memory_allocated() - before - gradients
    report.figure("linear full, memory beside the gradients", extra / 1e6, at_most=300, unit="MB")


def main() -> None:
    report.attempt("logits", logits)
    report.attempt("linear", linear)
    report.finish()


if __name__ == "__main__":
    main()
