"""Several processes under torchrun: who they are, and the sums that they must agree on.

One process without ``torchrun`` is a world of one; nothing here then touches torch.distributed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def share(count: int, what: str) -> range:
    """This process's part of ``count`` things, which the processes divide evenly."""
    each, left = divmod(count, world_size())
    if left:
        raise SaltireError(
            f"{count} {what} cannot be divided among {world_size()} ranks; make it a multiple."
        )
    return range(rank() * each, (rank() + 1) * each)


def sum_over_all(tensor: Tensor) -> Tensor:
    """The tensor summed over the processes, the same bits in each; itself in a world of one."""
    if world_size() > 1:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
    return tensor


def average_over_all(tensors: Sequence[Tensor]) -> None:
    """Put the mean over the processes in the place of each tensor, in one exchange, in place."""
    if world_size() == 1:
        return
    means = sum_over_all(torch.cat([tensor.flatten() for tensor in tensors])) / world_size()
    for tensor, mean in zip(tensors, means.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def from_first(value: T) -> T:
    """What the first process has, in every process; tensors and plain values."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
