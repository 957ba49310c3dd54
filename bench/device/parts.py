"""The parts of ``make device``, in order. A new room adds its line to ``BENCHES``.

A part is a command of its own, so that nothing it does can stop the others. What it prints goes to
build/device/NAME.log; lines that start with ``row `` or ``figure `` and go on with a JSON object
(bench/device/report.py writes them) go to the CSV and the report.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "device"
SITE = BUILD / "site"  # the package, built for the present architecture

PY = sys.executable


@dataclass(frozen=True)
class Part:
    """One command. needs: "" (nothing), "nvcc", "device", or a program's name as well."""

    name: str
    command: tuple[str, ...]
    seconds: int  # it is stopped after so long
    needs: tuple[str, ...] = ("device",)


def build_part(arch: str) -> Part:
    """Compile everything for one architecture ("90a") and put the package into SITE."""
    pip = [PY, "-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation", "--no-deps"]
    defines = {"SALTIRE_CUDA": "ON", "SALTIRE_CUDA_ARCHS": arch}
    settings = [f"build-dir={BUILD / 'cmake'}"]
    settings += [f"cmake.define.{name}={value}" for name, value in defines.items()]
    options = [word for setting in settings for word in ("-C", setting)]
    command = [*pip, "--upgrade", "--target", str(SITE), *options, str(ROOT)]
    return Part("build", tuple(command), 200, ("nvcc",))


def _bench(name: str, seconds: int) -> Part:
    return Part(name, (PY, "-m", f"bench.device.{name}"), seconds)


def _sanitizer(tool: str, seconds: int) -> Part:
    command = (
        "compute-sanitizer", "--tool", tool, "--error-exitcode", "3",
        PY, "-m", "bench.device.sanitized_cases",
    )  # fmt: skip
    return Part(tool, command, seconds, ("device", "compute-sanitizer"))


CEILINGS = _bench("ceilings", 60)
TESTS = Part("tests", (PY, "-m", "pytest", "-m", "cuda", "-p", "no:cacheprovider", "tests"), 120)
BENCHES = [
    _bench("transform_quantize", 40),
    _bench("lowbit_gemm", 90),
    _bench("linears_of_8b", 60),
    _bench("token_stats", 40),
    _bench("speculate", 30),
    _bench("skip_plan", 15),
]
BENCHES += [
    Part(f"decoder_{shape}", (PY, "-m", "bench.device.decoder", "--shape", shape), seconds)
    for shape, seconds in (("smollm2", 90), ("8b", 120))
]
SANITIZERS = [_sanitizer(tool, 90) for tool in ("memcheck", "racecheck", "synccheck")]


def all_parts(arch: str) -> list[Part]:
    """What ``make device`` does, figures before the slow sanitizers."""
    return [build_part(arch), CEILINGS, TESTS, *BENCHES, *SANITIZERS]
