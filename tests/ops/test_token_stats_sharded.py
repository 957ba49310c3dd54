"""Vocabulary-parallel token_stats: two processes, each with half of the head, equal one."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from saltire import ops


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(11, 16, generator=generator)
    head = torch.randn(50, 16, generator=generator)
    labels = torch.randint(0, 50, (11,), generator=generator)
    labels[4] = -100
    return hidden, head, labels


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    hidden, head, labels = problem()
    rows = slice(0, 20) if rank == 0 else slice(20, 50)
    hidden.requires_grad_()
    own = head[rows].clone().requires_grad_()
    stats = ops.sharded_token_stats(
        hidden, own, labels, first=rows.start, vocabulary=50, temperature=0.7
    )
    (stats.logprob.sum() - 0.3 * stats.entropy.sum()).backward()
    values = [stats.logprob, stats.entropy, stats.argmax, hidden.grad, own.grad]
    torch.save([value.detach() for value in values], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_half_a_head_each_equal_one_with_the_whole(tmp_path: Path) -> None:
    mp.spawn(one_rank, (str(tmp_path),), nprocs=2)
    hidden, head, labels = (t.requires_grad_(t.is_floating_point()) for t in problem())
    whole = ops.linear_token_stats(hidden, head, labels, temperature=0.7)
    (whole.logprob.sum() - 0.3 * whole.entropy.sum()).backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    kept = labels != -100
    for part in parts:
        torch.testing.assert_close(part[0], whole.logprob.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(part[1], whole.entropy.detach(), rtol=1e-5, atol=1e-5)
        assert torch.equal(part[2][kept], whole.argmax[kept])
        torch.testing.assert_close(part[3], hidden.grad, rtol=1e-4, atol=1e-5)
    both = torch.cat([part[4] for part in parts])
    torch.testing.assert_close(both, head.grad, rtol=1e-4, atol=1e-5)
