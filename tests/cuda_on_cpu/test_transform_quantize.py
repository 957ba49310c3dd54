"""transform_quantize's CUDA kernels on the emulator: the same bits as the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saltire import ops
from saltire.reference.transform_quantize import hartley_matrix
from tests.cuda_on_cpu.emulate import EmulatorError, build, run

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# K, hadamard, A of left, B of right, sum_group; each size says which path it takes.
SHAPES = {
    "registers, no rotation": (96, 1, 0, 0, 96),
    "registers, within a run": (96, 8, 0, 0, 32),
    "registers, across lanes": (192, 64, 0, 0, 64),
    "registers, a whole warp": (512, 256, 0, 0, 256),
    "registers, odd group": (192, 64, 0, 0, 24),
    "registers, two chunks": (4096, 128, 0, 0, 128),
    "registers, four chunks": (8192, 64, 0, 0, 8192),
    "shared, scalar": (100, 4, 0, 0, 20),
    "shared, one stage more than a warp": (512, 512, 0, 0, 512),
    "shared, all widths of stages": (8192, 8192, 0, 0, 32),
    "shared, left and Hadamard": (576, 64, 9, 0, 64),
    "shared, left and large Hadamard": (1536, 512, 3, 0, 128),
    "shared, Kronecker": (768, 1, 24, 32, 64),
    "shared, Kronecker off every width": (150, 1, 15, 10, 30),
}


@pytest.fixture(scope="module")
def program() -> Path:
    return build("transform_quantize")


def emulate(program: Path, x: Tensor, bits: int, floats: bool = False, seed: int = 0, **o):
    M, K = x.shape
    group = o.pop("sum_group", 0) or K
    right = o.get("right")
    if floats:
        out = {"y": (torch.float32, (M, K))}
    else:
        out = {
            "codes": (torch.int8, (M, K)),
            "scale": (torch.float32, (M,)),
            "sums": (torch.int32, (M, K // group)),
        }
    hadamard = o.pop("hadamard", 1)
    return run(
        program, seed, out, x=x, M=M, K=K, bits=bits, dtype=DTYPES[x.dtype], hadamard=hadamard,
        B=right.shape[0] if right is not None else hadamard, sum_group=group,
        clip=o.pop("clip", 1.0), **o,
    )  # fmt: skip


def options(shape: tuple[int, int, int, int, int]) -> dict[str, object]:
    K, hadamard, A, B, group = shape
    return {
        "diag": torch.rand(K) + 0.5,
        "hadamard": hadamard,
        "left": hartley_matrix(A).float() if A else None,
        "right": torch.linalg.qr(torch.randn(B, B))[0].contiguous() if B else None,
        "sum_group": group,
        "clip": 0.93,
    }


@pytest.mark.parametrize(("name", "shape"), SHAPES.items(), ids=SHAPES.keys())
def test_device_equals_cpu_bitwise(program, name, shape) -> None:
    dtype = list(DTYPES)[len(name) % 3]
    x = torch.randn(2, shape[0]).to(dtype)
    o = options(shape)
    got = emulate(program, x, 4, **o)
    assert got["plan"].startswith(name.split(",")[0])
    for one, other in zip(
        (got["codes"], got["scale"], got["sums"]), ops.transform_quantize(x, 4, **o), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 8])
def test_every_dtype_and_width(program, dtype, bits) -> None:
    x = torch.randn(3, 320).to(dtype)
    got = emulate(program, x, bits, hadamard=64, sum_group=32)
    for one, other in zip(
        (got["codes"], got["scale"], got["sums"]),
        ops.transform_quantize(x, bits, hadamard=64, sum_group=32),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["registers, two chunks", "shared, left and Hadamard"])
def test_transform_alone_equals_cpu_bitwise(program, name) -> None:
    o = options(SHAPES[name])
    del o["sum_group"], o["clip"]
    x = torch.randn(2, SHAPES[name][0])
    assert torch.equal(emulate(program, x, 4, floats=True, **o)["y"], ops.transform(x, **o))


def test_damaged_and_zero_tokens(program) -> None:
    x = torch.randn(5, 256)
    x[0, 7], x[1, 250], x[2], x[3] = float("nan"), float("-inf"), 0.0, 1e-40
    for hadamard in (64, 256):
        got = emulate(program, x, 4, hadamard=hadamard)
        want = ops.transform_quantize(x, 4, hadamard=hadamard)
        assert torch.equal(got["codes"], want[0])
        assert torch.equal(got["scale"].isnan(), want[1].isnan())
        assert torch.equal(got["scale"][2:], want[1][2:])
        assert torch.equal(got["sums"], want[2])


@pytest.mark.parametrize("skew", [4, 8])
def test_rows_that_start_off_16_bytes(program, skew) -> None:
    x = torch.randn(2, 256)
    got = emulate(program, x, 4, hadamard=64, skew_x=skew)
    assert "scalar" in got["plan"]
    assert torch.equal(got["codes"], ops.transform_quantize(x, 4, hadamard=64)[0])


def test_a_token_too_long_for_shared_memory_is_refused(program) -> None:
    with pytest.raises(EmulatorError, match="shared memory; this device has"):
        emulate(program, torch.zeros(1, 64 * 1024), 4, hadamard=65536)
