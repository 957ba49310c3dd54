"""token_stats against torch: from logits, and from hidden states and the head.

Keys of the last line (times are medians of ratios within interleaved rounds, 2 threads, f32):
logits_fwd_vs_torch (>= 4) and logits_fwdbwd_vs_torch (>= 2.5): eager log_softmax, gather and
entropy, T = 512, V = 49,152. linear_fwd_vs_matmul (<= 1.3): our forward over h·Wᵀ alone.
linear_fwdbwd_vs_matmuls (<= 1.3): forward and backward, four products since backward computes the
logits again, over the three products alone that a version holding all logits needs.
linear_fwdbwd_vs_chunked_torch (>= 1.5): 512 tokens at a time, logits computed again in backward.
linear_extra_mb (<= 64): peak memory of forward and backward beyond inputs and gradients, T = 4,096
in a process of its own. near_collapse_error (<= 1e-6): of H, about 1e-4, under an offset of 300.
D = 576, V = 49,152; T = 4,096, with --quick 1,024 for the times.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saltire import ops

HERE = Path(__file__).parent
D, V = 576, 49_152


def rounds(variants: dict[str, Callable[[], object]], count: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(count):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(f"{name:34} {statistics.median(values) * 1e3:9.2f} ms")
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    pairs = zip(seconds[above], seconds[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def eager(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    log_p = logits.log_softmax(dim=-1)
    return log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)


def chunked(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """512 tokens at a time; nothing of [512, V] is kept for backward."""
    parts = [
        checkpoint(lambda h, y: eager(h @ head.T, y), h, y, use_reentrant=False)
        for h, y in zip(hidden.split(512), labels.split(512), strict=True)
    ]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def logits_times(quick: bool) -> dict[str, float]:
    T = 512
    x = (torch.randn(T, V) * 2).requires_grad_()
    labels = torch.randint(0, V, (T,))
    weight = torch.randn(T)

    def ours_backward() -> None:
        stats = ops.token_stats(x, labels)
        torch.autograd.grad((stats.logprob * weight).sum() + 0.01 * stats.entropy.sum(), x)

    def torch_backward() -> None:
        logprob, entropy = eager(x, labels)
        torch.autograd.grad((logprob * weight).sum() + 0.01 * entropy.sum(), x)

    fixed = x.detach()
    seconds = rounds(
        {
            "logits forward, torch": lambda: eager(fixed, labels),
            "logits forward, ours": lambda: ops.token_stats(fixed, labels),
            "logits forward+backward, torch": torch_backward,
            "logits forward+backward, ours": ours_backward,
        },
        5 if quick else 15,
    )
    return {
        "logits_fwd_vs_torch": ratio(seconds, "logits forward, torch", "logits forward, ours"),
        "logits_fwdbwd_vs_torch": ratio(
            seconds, "logits forward+backward, torch", "logits forward+backward, ours"
        ),
    }


def linear_times(quick: bool) -> dict[str, float]:
    T = 1024 if quick else 4096
    hidden = torch.randn(T, D, requires_grad=True)
    head = (torch.randn(V, D) * 0.05).requires_grad_()
    labels = torch.randint(0, V, (T,))
    weight = torch.randn(T)
    h, w = hidden.detach(), head.detach()
    dz = torch.randn(T, V)
    z = torch.empty(T, V)  # reused: neither page faults nor allocation count against torch

    def backward(stats: Callable[[], tuple[Tensor, Tensor]]) -> None:
        logprob, entropy = stats()
        loss = (logprob * weight).sum() + 0.01 * entropy.sum()
        torch.autograd.grad(loss, (hidden, head))

    def ours() -> tuple[Tensor, Tensor]:
        stats = ops.linear_token_stats(hidden, head, labels)
        assert stats.logprob is not None
        return stats.logprob, stats.entropy

    dh, dw = torch.empty(T, D), torch.empty(V, D)

    def three_products() -> None:
        torch.mm(h, w.T, out=z)
        torch.mm(dz, w, out=dh)
        torch.mm(dz.T, h, out=dw)

    seconds = rounds(
        {
            "linear forward, matmul": lambda: torch.mm(h, w.T, out=z),
            "linear forward, ours": lambda: ops.linear_token_stats(h, w, labels),
            "linear fwd+bwd, three matmuls": three_products,
            "linear fwd+bwd, ours": lambda: backward(ours),
            "linear fwd+bwd, chunked torch": lambda: backward(
                lambda: chunked(hidden, head, labels)
            ),
        },
        3 if quick else 5,
    )
    products = 2 * T * D * V / 1e9
    for name, count in (("linear forward, ours", 1), ("linear fwd+bwd, ours", 4)):
        print(f"{name}: {count * products / statistics.median(seconds[name]):.0f} GFLOP/s")
    return {
        "linear_fwd_vs_matmul": ratio(seconds, "linear forward, ours", "linear forward, matmul"),
        "linear_fwdbwd_vs_matmuls": ratio(
            seconds, "linear fwd+bwd, ours", "linear fwd+bwd, three matmuls"
        ),
        "linear_fwdbwd_vs_chunked_torch": ratio(
            seconds, "linear fwd+bwd, chunked torch", "linear fwd+bwd, ours"
        ),
    }


def status(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def extra_memory() -> float:
    """Run in a process of its own: peak of forward and backward beyond inputs and gradients."""
    T = 4096
    hidden = torch.randn(T, D, requires_grad=True)
    head = (torch.randn(V, D) * 0.05).requires_grad_()
    labels = torch.randint(0, V, (T,))
    small = ops.linear_token_stats(hidden[:8], head[:8], labels[:8] % 8)
    torch.autograd.grad(small.entropy.sum(), (hidden, head))  # everything is loaded and warm
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS")
    stats = ops.linear_token_stats(hidden, head, labels)
    loss = stats.logprob.sum() + stats.entropy.sum()
    gradients = torch.autograd.grad(loss, (hidden, head))
    return status("VmHWM") - before - sum(g.numel() * 4 for g in gradients) / 2**20


def near_collapse_error() -> float:
    torch.manual_seed(0)
    logits = torch.randn(64, V)
    logits[:, 7] = 23.7  # 4e-6 of the mass is elsewhere, at 25 nats: H = 1e-4
    logits += 300
    exact = logits.double().log_softmax(dim=-1)
    want = -(exact.exp() * exact).sum(dim=-1)
    print(f"near collapse: H = {float(want.mean()):.2e}")
    return float((ops.token_stats(logits).entropy - want).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, T = 1,024")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(extra_memory())
        return
    child = [sys.executable, __file__, "--memory", "--threads", str(options.threads)]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    keys = logits_times(options.quick) | linear_times(options.quick)
    keys["linear_extra_mb"] = float(done.stdout.split()[-1])
    rounded = {name: round(value, 3) for name, value in keys.items()}
    rounded["near_collapse_error"] = near_collapse_error()
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    )
    stamp = {
        "commit": git.stdout.strip(),
        "isa": ops.current_isa(),
        "threads": options.threads,
        "quick": options.quick,
    }
    path = HERE / "results" / "token_stats.csv"
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*stamp, *rounded])
        if new:
            writer.writeheader()
        writer.writerow({**stamp, **rounded})
    print(json.dumps({**rounded, **stamp}))


if __name__ == "__main__":
    main()
