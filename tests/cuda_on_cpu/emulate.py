"""Builds the emulator with a room's kernels and runs cases on it (emulator/emulator.h says how)."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
EMULATOR = HERE / "emulator"
BUILD = ROOT / "build" / "cuda_on_cpu"
COMPILER = os.environ.get("CXX", "g++")

COMMON = [
    "-std=c++17",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unused-function",
    "-Wno-unknown-pragmas",
]
INCLUDES = [f"-I{EMULATOR / 'include'}", f"-I{EMULATOR}", f"-I{CSRC}"]
ENGINE_FLAGS = [*COMMON, "-O2", *INCLUDES]
# thread: for its hooks alone, which memory.cpp defines; the sanitizer itself is not linked.
KERNEL_FLAGS = [
    *COMMON, "-O1", "-ffp-contract=off", "-fsanitize=thread,undefined",
    "-fno-sanitize-recover=all", "-Wno-tsan", *INCLUDES,
]  # fmt: skip


def _digest(files: list[Path], flags: list[str]) -> str:
    digest = hashlib.sha256(" ".join([COMPILER, *flags]).encode())
    for file in sorted(files):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _sources(*folders: Path) -> list[Path]:
    kinds = {".h", ".cpp", ".cu"}
    return [f for folder in folders for f in folder.rglob("*") if f.suffix in kinds]


def _compile(source: Path, flags: list[str], depends: list[Path]) -> Path:
    """The object of ``source``, compiled if nothing in ``depends`` was ever compiled like this."""
    target = BUILD / f"{source.parent.name}.{source.stem}.{_digest([source, *depends], flags)}.o"
    if not target.exists():
        temporary = target.with_suffix(f".{os.getpid()}.tmp")
        command = [COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", str(temporary)]
        subprocess.run(command, check=True)
        temporary.replace(target)
    return target


def build(name: str) -> Path:
    """Build the emulator with the driver ``NAME.cpp`` and, if there is one, the room of that name.

    Returns the program. Objects are cached under ``build/`` by the contents of their sources.
    """
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"no C++ compiler {COMPILER!r}; set CXX")
    BUILD.mkdir(parents=True, exist_ok=True)
    room = CSRC / name
    core = _sources(CSRC / "core", EMULATOR)
    jobs = [(source, ENGINE_FLAGS, core) for source in sorted(EMULATOR.glob("*.cpp"))]
    kernels = sorted(room.glob("*.cu")) if room.is_dir() else []
    depends = core + _sources(room) if room.is_dir() else core
    jobs += [(source, KERNEL_FLAGS, depends) for source in [HERE / f"{name}.cpp", *kernels]]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    program = BUILD / f"{name}.{_digest(objects, [])}"
    if not program.exists():
        temporary = program.with_suffix(f".{os.getpid()}.tmp")
        command = [COMPILER, "-fsanitize=undefined", *map(str, objects), "-o", str(temporary)]
        subprocess.run(command, check=True)
        temporary.replace(program)
    return program


class EmulatorError(AssertionError):
    """The emulator stopped: its message tells the kernel, the thread and what was wrong."""


def _raw(tensor: Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def run(
    program: Path,
    seed: int = 0,
    out: dict[str, tuple[torch.dtype, tuple[int, ...]]] | None = None,
    inout: dict[str, Tensor] | None = None,
    zeros: dict[str, int] | None = None,
    **inputs: Tensor | float | int | str | None,
) -> dict[str, Tensor]:
    """Run one case and return what ``out`` and ``inout`` name.

    out: name -> dtype and shape. zeros: name -> bytes. inputs: tensors, numbers and words; None is
    left out. Raises EmulatorError with the emulator's message.
    """
    parts: list[bytes] = []
    for name, value in inputs.items():
        if isinstance(value, str):
            parts.append(f"word {name} {value}\n".encode())
        elif isinstance(value, (int, float)):
            parts.append(f"number {name} {float(value)!r}\n".encode())
    for name, size in (zeros or {}).items():
        parts.append(f"zeros {name} {size}\n".encode())
    for kind, tensors in (("in", inputs), ("inout", inout or {})):
        for name, value in tensors.items():
            if isinstance(value, Tensor):
                raw = _raw(value)
                parts += [f"{kind} {name} {len(raw)}\n".encode(), raw]
    for name, (dtype, shape) in (out or {}).items():
        size = torch.empty(shape, dtype=dtype, device="meta").numel() * dtype.itemsize
        parts.append(f"out {name} {size}\n".encode())
    done = subprocess.run(
        [str(program)],
        input=b"".join([*parts, b"end\n"]),
        capture_output=True,
        check=False,
        env={**os.environ, "EMULATOR_SEED": str(seed), "UBSAN_OPTIONS": "print_stacktrace=1"},
    )
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip()
        raise EmulatorError(message or f"the emulator ended with status {done.returncode}")
    return _parse(done.stdout, out or {}, inout or {})


def _parse(
    output: bytes,
    out: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    inout: dict[str, Tensor],
) -> dict[str, Tensor]:
    shapes = {**out, **{name: (t.dtype, tuple(t.shape)) for name, t in inout.items()}}
    results: dict[str, Tensor] = {}
    while output:
        header, output = output.split(b"\n", 1)
        kind, name, size = header.decode().split()
        raw, output = output[: int(size)], output[int(size) :]
        if kind == "text":
            results[name] = raw.decode()  # type: ignore[assignment]
            continue
        dtype, shape = shapes[name]
        flat = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        results[name] = flat.reshape(shape)
    return results
