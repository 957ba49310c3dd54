"""What ranks must agree on: sums of a few numbers, and who writes.

One process without ``torchrun`` is a world of one; nothing here then touches torch.distributed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from saltire.errors import SaltireError

T = TypeVar("T")


def start_if_launched() -> None:
    """Join the process group that torchrun has prepared, with gloo on CPU and NCCL on CUDA."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


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


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def share(count: int, what: str) -> range:
    """This rank's part of ``count`` things, which the ranks divide evenly."""
    each, left = divmod(count, world_size())
    if left:
        raise SaltireError(
            f"{count} {what} cannot be divided among {world_size()} ranks; make it a multiple."
        )
    return range(rank() * each, (rank() + 1) * each)


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
