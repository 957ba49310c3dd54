"""Work that is done again and again on the same memory: recorded once, then replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Replay = Callable[[], None]
Recorder = Callable[[Callable[[], None], Sequence[Tensor]], Replay]


def keep_calling(work: Callable[[], None], changed: Sequence[Tensor]) -> Replay:
    """Where there are no graphs: to replay is to call."""
    return work


class GraphRecorder:
    """Records CUDA graphs; all take their memory from one pool.

    That is sound because replays never overlap, and what a replay leaves lies in memory that the
    caller owns.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], None], changed: Sequence[Tensor]) -> Replay:
        """changed: what ``work`` both reads and writes. It is called once beforehand, because
        libraries set themselves up in their first call and must not do so in a graph."""
        kept = [tensor.clone() for tensor in changed]
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        for tensor, before in zip(changed, kept, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()
        return graph.replay
