"""The #include rule: a room includes core and itself, never another room; core includes no room."""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
ROOMS = {folder.name for folder in CSRC.iterdir() if folder.is_dir() and folder.name != "core"}


def test_rooms_include_core_and_themselves_only() -> None:
    wrong = []
    for file in CSRC.rglob("*"):
        if file.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        home = file.relative_to(CSRC).parts[0]
        for target in re.findall(r'#include "([^"]+)"', file.read_text()):
            room = target.split("/")[0]
            if room in ROOMS and room != home:
                wrong.append(f"{file.relative_to(CSRC)} includes {target}")
    assert not wrong, wrong


def test_torch_stays_in_op_files_and_core() -> None:
    """Kernels are torch-free, so that they compile alone, for the sanitizers and the emulator."""
    allowed = {"op.cpp", "cuda.cpp", "library.cpp", "threads.h", "tensor.h"}
    wrong = [
        str(file.relative_to(CSRC))
        for file in CSRC.rglob("*")
        if file.suffix in {".h", ".cpp", ".cu", ".cuh"}
        and file.name not in allowed
        and "<torch/" in file.read_text()
    ]
    assert not wrong, wrong
