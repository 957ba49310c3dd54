"""What ranks must agree on: sums of a few numbers, and who writes.

One process without ``torchrun`` is a world of one; nothing here then touches torch.distributed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from saltire.processes import barrier, rank, share, start_if_launched, world_size

__all__ = ["barrier", "rank", "share", "start_if_launched", "world_size"]

T = TypeVar("T")


def default_device() -> torch.device:
    """This process's CUDA device if there is one, else the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else (torch.device("cpu"))
    )


def all_sum(values: Sequence[float]) -> list[float]:
    """Each value summed over the ranks in float64: the same numbers on every rank."""
    return _reduce(values, dist.ReduceOp.SUM)


def all_max(values: Sequence[float]) -> list[float]:
    """Each value's largest over the ranks."""
    return _reduce(values, dist.ReduceOp.MAX)


def gather(things: list[T]) -> list[T]:
    """Every rank's things, rank after rank, on every rank. They are our own processes' objects."""
    if world_size() == 1:
        return things
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, things)
    return [thing for part in parts for thing in part]


def part_of(things: Sequence[T]) -> Sequence[T]:
    """This rank's part of some things, in order, where the parts need not be equal."""
    first, last = (len(things) * r // world_size() for r in (rank(), rank() + 1))
    return things[first:last]


def shard(policy: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Shard parameters, gradients and optimiser state over the ranks (FSDP2), layer by layer.

    Does nothing in a world of one.
    """
    if world_size() == 1:
        return
    mesh = init_device_mesh(default_device().type, (world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)


def sync_gradients(policy: nn.Module, wanted: bool) -> None:
    """Reduce gradients over the ranks in the next backward, or leave that for a later one."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(wanted)


def _reduce(values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    if world_size() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(tensor, op=operation)
    return tensor.tolist()
