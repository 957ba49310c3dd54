"""What every bench shares: interleaved timing, machine peaks of the same run, CSV and JSON.

Speeds drift on shared machines, by half and within seconds, so times of different moments say
little. Variants therefore take turns, round after round, each on inputs of its own that rotate past
the last cache level, and a comparison is the median of the ratios within rounds.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROTATED_BYTES = 96 << 20  # three times an L3 of 32 MB: a weight has left it when its turn returns
PAUSE = 0.06  # seconds; onnxruntime's threads spin for about 40 ms after their work
WARM = 0.01  # seconds


def copies_past_l3(bytes_each: int) -> int:
    """How many copies of an input must take turns so that each comes from memory."""
    return max(2, -(-ROTATED_BYTES // bytes_each))


@dataclass(frozen=True)
class Variant:
    """One thing to time. ``run(i)`` does the work once, on its i-th copy of the inputs."""

    name: str
    run: Callable[[int], object]


@dataclass
class Timing:
    """Seconds of each round."""

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median


class Rounds:
    """The timings of one comparison."""

    def __init__(self, timings: Sequence[Timing]) -> None:
        self.timings = {timing.name: timing for timing in timings}

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    def __contains__(self, name: str) -> bool:
        return name in self.timings

    def ratio(self, above: str, below: str) -> float:
        """Median over rounds of time ``above`` / time ``below``: how much faster ``below`` is."""
        pairs = zip(self[above].seconds, self[below].seconds, strict=True)
        return statistics.median(a / b for a, b in pairs)


def interleave(variants: Sequence[Variant], seconds: float, calls: int = 1) -> Rounds:
    """Time the variants in turns for about ``seconds``, at least five rounds.

    Each turn is a pause, 10 ms of untimed calls, then ``calls`` timed ones; their mean counts. The
    pause lets the threads of the variant before fall asleep: OpenMP's and onnxruntime's spin on
    after their work, on the cores that the next variant needs (measured: without it, either is
    slowed tenfold). The untimed calls wake the variant's own threads and the cores.
    """
    timings = [Timing(variant.name) for variant in variants]
    turn = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(timings[0].seconds) < 5:
        for variant, timing in zip(variants, timings, strict=True):
            time.sleep(PAUSE)
            awake = time.perf_counter() + WARM
            while (start := time.perf_counter()) < awake:
                variant.run(turn := turn + 1)
            for _ in range(calls):
                variant.run(turn := turn + 1)
            timing.seconds.append((time.perf_counter() - start) / calls)
    return Rounds(timings)


class Native:
    """The small C++ beside the benches: the machine's peaks and the usual AVX2 int8 loop."""

    def __init__(self) -> None:
        source = HERE / "native.cpp"
        library = HERE.parent / "build" / "bench" / "native.so"
        if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
            library.parent.mkdir(parents=True, exist_ok=True)
            flags = ["-O3", "-march=native", "-shared", "-fPIC", "-std=c++17"]
            subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.vnni_loop.restype = ctypes.c_int
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)

    def on_all_threads(self, work: Callable[[int], object]) -> None:
        """``work(thread)`` on every thread at once; ctypes calls run outside Python's lock."""
        for done in [self.pool.submit(work, thread) for thread in range(self.threads)]:
            done.result()

    @cached_property
    def has_vnni(self) -> bool:
        return bool(self.library.vnni_loop(ctypes.c_int64(1)))

    @cached_property
    def _memory(self) -> torch.Tensor:
        return torch.ones(self.threads * (96 << 20), dtype=torch.uint8)

    def dram(self) -> Variant:
        """Read memory far beyond the caches on all threads."""
        share = self._memory.numel() // self.threads

        def read(thread: int) -> None:
            start = ctypes.c_void_p(self._memory.data_ptr() + thread * share)
            self.library.read_bytes(start, ctypes.c_int64(share))

        return Variant("dram", lambda turn: self.on_all_threads(read))

    @property
    def dram_bytes(self) -> int:
        return self._memory.numel()

    VNNI_STEPS = 400_000

    def vnni(self) -> Variant:
        """Independent vpdpbusd on all threads, no memory."""
        steps = ctypes.c_int64(self.VNNI_STEPS)

        def run(turn: int) -> None:
            self.on_all_threads(lambda thread: self.library.vnni_loop(steps))

        return Variant("vnni", run)

    @property
    def vnni_operations(self) -> int:
        """Two a multiply-add, 64 multiply-adds a zmm, 24 zmm a step."""
        return self.VNNI_STEPS * 24 * 64 * 2 * self.threads


def commit() -> str:
    """The checked-out commit, with a plus if tracked files differ from it."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "-s", "-uno") else "")


def device() -> str:
    """The processor and how many threads torch uses, or the CUDA device."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0].split(":")[1].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads"


class Report:
    """Rows for bench/results/NAME.csv and keys for the JSON object of the last line."""

    def __init__(self, name: str, quick: bool) -> None:
        self.name = name
        self.quick = quick
        self.rows: list[dict[str, Any]] = []
        self.keys: dict[str, Any] = {}
        self.start = time.perf_counter()

    def row(self, case: str, timing: Timing, **figures: Any) -> None:
        """One timing; printed now, written at the end."""
        row = {
            "case": case,
            "variant": timing.name,
            "median_ms": round(timing.median * 1e3, 4),
            "spread": round(timing.spread, 3),
            "rounds": len(timing.seconds),
            **{name: round(value, 3) for name, value in figures.items()},
        }
        self.rows.append(row)
        extra = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        time_ = f"{row['median_ms']:9.3f} ms ±{row['spread']:5.1%}"
        print(f"{case:30} {timing.name:22} {time_}  {extra}")
        sys.stdout.flush()

    def key(self, name: str, value: float) -> None:
        self.keys[name] = round(value, 3)

    def finish(self) -> None:
        """Append the rows to the CSV and print the JSON object as the last line."""
        stamp = {
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "device": device(),
            "quick": self.quick,
        }
        path = HERE / "results" / f"{self.name}.csv"
        path.parent.mkdir(exist_ok=True)
        columns = [*stamp, *dict.fromkeys(column for row in self.rows for column in row)]
        old = list(csv.DictReader(path.open())) if path.exists() else []
        columns = list(dict.fromkeys([*(old[0] if old else ()), *columns]))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows([*old, *({**stamp, **row} for row in self.rows)])
        seconds = round(time.perf_counter() - self.start, 1)
        print(json.dumps({**self.keys, **stamp, "seconds": seconds}))


def arguments(doc: str) -> argparse.Namespace:
    """``--quick`` and ``--threads``, which every bench takes."""
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, the same method")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options
