"""Compiles one kernel file for one architecture and reads what the compiler made of it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.cuda_on_cpu.emulate import CSRC, ROOT

BUILD = ROOT / "build" / "cuda_compiler"
# As CMakeLists.txt gives them.
FLAGS = ["-std=c++17", "-O3", "--fmad=false", "--expt-relaxed-constexpr", f"-I{CSRC}"]


@dataclass
class Kernel:
    """One kernel's machine code: its opcodes (with modifiers) and what it takes."""

    name: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    opcodes: list[str] = field(default_factory=list)

    def count(self, prefix: str) -> int:
        """How many instructions start with ``prefix``."""
        return sum(op.startswith(prefix) for op in self.opcodes)


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def nvdisasm() -> str | None:
    """The disassembler: of its PyPI wheel, or of a CUDA toolkit."""
    for site in map(Path, sys.path):
        for folder in sorted(site.glob("nvidia/cu*/bin"), reverse=True):
            if (folder / "nvdisasm").exists():
                return str(folder / "nvdisasm")
    return shutil.which("nvdisasm")


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def compile_kernels(source: Path, arch: str) -> tuple[dict[str, Kernel], list[str]]:
    """Compile ``source`` for ``arch`` ("80", "90a") and return its kernels and ptxas' warnings.

    Results are cached under ``build/`` by the contents of the sources.
    """
    compiler, disassembler = nvcc(), nvdisasm()
    assert compiler
    assert disassembler
    files = [f for d in (CSRC / "core", source.parent) for f in d.rglob("*") if f.suffix != ".cpp"]
    digest = hashlib.sha256(" ".join([arch, *FLAGS]).encode())
    for file in sorted(f for f in files if f.is_file()):
        digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    BUILD.mkdir(parents=True, exist_ok=True)
    stem = BUILD / f"{source.parent.name}.{source.stem}.{arch}.{digest.hexdigest()[:16]}"
    report, sass = stem.with_suffix(stem.suffix + ".log"), stem.with_suffix(stem.suffix + ".sass")
    if not sass.exists():
        cubin = stem.with_suffix(f".{os.getpid()}.cubin")
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = [compiler, *FLAGS, target, "-Xptxas", "-v", "-cubin", str(source), "-o"]
        report.write_text(_run([*command, str(cubin)]))
        temporary = cubin.with_suffix(".tmp")
        temporary.write_text(_run([disassembler, "-c", str(cubin)]))
        cubin.unlink()
        temporary.replace(sass)
    return _read(report.read_text(), sass.read_text())


def compile_registration(source: Path) -> None:
    """Compile a room's cuda.cpp, which links a device's ops to torch, as CMakeLists.txt does."""
    compiler = nvcc()
    assert compiler
    include = Path(torch.__file__).parent / "include"
    defines = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command = [compiler, "-std=c++17", *defines, f"-I{CSRC}", "-isystem", str(include)]
    _run([*command, "-Xcompiler", "-fsyntax-only", "-c", str(source), "-o", os.devnull])


def _read(report: str, sass: str) -> tuple[dict[str, Kernel], list[str]]:
    kernels: dict[str, Kernel] = {}
    current: Kernel | None = None
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            current = kernels.setdefault(found[1], Kernel(found[1]))
        if current and (found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill st", line)):
            current.stack, current.spills = int(found[1]), int(found[2])
        if current and (found := re.search(r"Used (\d+) registers", line)):
            current.registers = int(found[1])
    current = None
    instruction = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
    for line in sass.splitlines():
        if found := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            current = kernels.get(found[1])
        if current and (found := instruction.match(line)):
            # ptxas leaves loops of whole blocks by a CALL without a return address: to a label of
            # the same kernel, so it is a jump.
            jump = found[1].startswith("CALL") and "`(.L_x_" in line
            current.opcodes.append("JUMP" if jump else found[1])
    warnings = [line for line in report.splitlines() if "warning" in line.lower()]
    return kernels, warnings
