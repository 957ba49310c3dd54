"""Times of device work: CUDA events around replays of a graph, inputs rotated past the L2."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROTATED = 3  # times the L2 that the copies of an input fill together
ROUNDS = 15
ROUND_SECONDS = 4e-3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the rounds, and their quartile range over it."""

    seconds: float
    spread: float


def copies_past_l2(bytes_each: int) -> int:
    """How many copies of an input must take turns so that each comes from memory."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-ROTATED * l2 // max(1, bytes_each)))


def time_turns(call: Callable[[int], object], turns: int, graph: bool = True) -> Timing:
    """Time ``call(0)``, ``call(1)`` .. ``call(turns - 1)`` one after another, per call.

    All turns are captured as one CUDA graph, so that gaps between launches are the device's own;
    graph=False: launched one by one, for what cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for turn in range(turns):
            call(turn)
    torch.cuda.synchronize()

    def eager() -> None:
        for turn in range(turns):
            call(turn)

    run: Callable[[], object] = eager
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, stream=stream):
            eager()
        run = captured.replay
    once = _elapsed(run, 1)
    replays = max(1, int(ROUND_SECONDS / max(once, 1e-6)))
    rounds = sorted(_elapsed(run, replays) / (replays * turns) for _ in range(ROUNDS))
    median = statistics.median(rounds)
    return Timing(median, (rounds[3 * ROUNDS // 4] - rounds[ROUNDS // 4]) / median)


def _elapsed(run: Callable[[], object], count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
