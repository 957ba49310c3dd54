"""What nvcc and ptxas make of the kernels: no spills, no local memory, the tensor cores meant."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.cuda_on_cpu.compiler import (
    Kernel,
    compile_kernels,
    compile_registration,
    nvcc,
    nvdisasm,
)
from tests.cuda_on_cpu.emulate import CSRC, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvcc() is None, reason="no CUDA compiler"),
    pytest.mark.skipif(nvdisasm() is None, reason="no nvdisasm: pip install nvidia-cuda-nvdisasm"),
]

TENSOR_CORES = ["IMMA", "HMMA", "IGMMA", "HGMMA"]
BEFORE_HOPPER, HOPPER = ["80", "86", "89"], ["90a"]


def architectures(stem: str) -> list[str]:
    if stem.startswith("sm80_"):
        return BEFORE_HOPPER
    return HOPPER if stem.startswith("sm90_") else BEFORE_HOPPER + HOPPER


FILES = sorted(f for f in CSRC.glob("*/*.cu") if f.stem.startswith(("kernel", "sm80_", "sm90_")))
CASES = {
    f"{file.parent.name}/{file.stem}-{arch}": (file, arch)
    for file in FILES
    for arch in architectures(file.stem)
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[dict[str, Kernel], list[str]]]:
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda case: compile_kernels(*case), CASES.values())
        return dict(zip(CASES, results, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_no_spills_no_stack_no_warnings(compiled, case) -> None:
    kernels, warnings = compiled[case]
    assert kernels
    assert not warnings
    for kernel in kernels.values():
        assert kernel.opcodes, f"{kernel.name}: no machine code read"
        assert (kernel.spills, kernel.stack) == (0, 0), kernel.name
        assert kernel.count("LDL") + kernel.count("STL") == 0, kernel.name


@pytest.mark.parametrize("case", CASES)
def test_tensor_core_kernels_call_nothing(compiled, case) -> None:
    """An emulated 4-bit product is a call; so is a division, which has no place beside one."""
    for kernel in compiled[case][0].values():
        if any(kernel.count(opcode) for opcode in TENSOR_CORES):
            assert kernel.count("CALL") == 0, kernel.name


@pytest.mark.parametrize("room", sorted(f.parent.name for f in CSRC.glob("*/cuda.cpp")))
def test_registrations_compile(room) -> None:
    compile_registration(CSRC / room / "cuda.cpp")


LIBRARY = ROOT / "build" / "cuda" / "libsaltire_cuda.so"  # of `make cuda`


@pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built: make cuda")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA: the library loads")
def test_the_library_loads_and_registers_its_ops(tmp_path) -> None:
    """Beside a torch without CUDA: of its symbols only the one that tells the stream is missing."""
    stub = tmp_path / "stub.c"
    stub.write_text("int aoti_torch_get_current_cuda_stream(int d, void** s) { return 1; }\n")
    command = ["gcc", "-shared", "-fPIC", "-w", str(stub), "-o", str(tmp_path / "stub.so")]
    subprocess.run(command, check=True)
    code = (
        "import torch, saltire.ops\n"
        f"torch.ops.load_library({str(LIBRARY)!r})\n"
        "for op in ('lowbit_gemm', 'linear_token_stats_backward', 'speculate_verify'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key('saltire::' + op, 'CUDA'), op\n"
    )
    environment = {**os.environ, "LD_PRELOAD": str(tmp_path / "stub.so")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# File -> opcode prefix that the kernels whose name holds the word must have, by architecture.
INTENDED: list[tuple[str, str, str]] = [
    ("transform_quantize/kernel", "transform_in", "REDUX"),
    ("decoder_layer/kernel_tokens", "prepare", "REDUX"),
    ("decoder_layer/kernel_prompt", "attend_prompt", "HMMA.16816.F32.BF16"),
    ("decoder_layer/kernel_prompt", "attend_prompt", "LDGSTS"),
    ("lowbit_gemm/kernel_gemv", "gemv", "IDP.4A.S8.S8"),
    ("lowbit_gemm/kernel_mma", "multiply_stream", "IMMA.16832.S8.S8"),
    ("lowbit_gemm/kernel_mma", "multiply_stream", "LDGSTS"),
    ("lowbit_gemm/sm80_prefill", "multiply_tilesILi4ELb1", "IMMA.16864.S4.S4"),
    ("lowbit_gemm/sm80_prefill", "multiply_tilesILi2ELb1", "IMMA.16864.S4.S4"),
    ("lowbit_gemm/sm80_prefill", "multiply_tilesILi4ELb0", "IMMA.16832.S8.S8"),
    ("lowbit_gemm/sm90_prefill", "multiply_tiles", "IGMMA.64x128x32.S8.S8"),
    ("lowbit_gemm/sm90_prefill", "multiply_tiles", "UTMALDG.2D"),
    ("token_stats/kernel_rows", "stats_of_rows", "MUFU.EX2"),
    ("token_stats/kernel_rows", "stats_of_rows", "LDG.E.NA.LTC128B.128"),
    ("token_stats/kernel_mma", "multiply_tiles", "HMMA.16816.F32.BF16"),
    ("token_stats/kernel_mma", "multiply_tiles", "LDGSTS"),
    ("token_stats/sm90_linear", "multiply_tiles", "HGMMA.64x256x16.F32.BF16"),
    ("token_stats/sm90_linear", "multiply_tiles", "UTMALDG.2D.MULTICAST"),
]


@pytest.mark.parametrize(("file", "word", "opcode"), INTENDED)
def test_the_intended_instruction_is_there(compiled, file, word, opcode) -> None:
    found = 0
    for case, (kernels, _) in compiled.items():
        if case.rsplit("-", 1)[0] != file:
            continue
        for kernel in kernels.values():
            if word in kernel.name:
                assert kernel.count(opcode) > 0, f"{case}: {kernel.name} has no {opcode}"
                found += 1
    assert found
