"""lowbit_gemm's CUDA kernels on the emulator, against the specification.

Scales and zeros that are powers of two and whole numbers make every float of the formula exact, so
results must equal the reference to the bit, in whatever order a kernel adds; other tests take
arbitrary scales and a tolerance.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saltire import reference
from tests.cuda_on_cpu.emulate import build, run

ROUTES = {"gemv": 0, "mma": 1, "sm80": 2, "sm90": 3}
OUT = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@pytest.fixture(scope="module")
def program() -> Path:
    return build("lowbit_gemm")


class Layer:
    """A random weight in checkpoint and in device layout, and tokens for it."""

    def __init__(
        self, program: Path, M: int, N: int, K: int, bits: int = 4, group: int = 0,
        act_bits: int = 4, zero: bool = False, half: bool = False, exact: bool = True,
    ) -> None:  # fmt: skip
        self.program, self.M, self.N, self.K, self.bits = program, M, N, K, bits
        self.group, self.act_bits = group or K, act_bits
        groups = K // self.group
        table = torch.float16 if half else torch.float32
        self.codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
        self.packed = reference.lowbit_gemm.pack_weight(self.codes, bits)
        powers = torch.tensor([0.25, 0.5, 1.0, 2.0])
        scale = powers[torch.randint(4, (N, groups))] if exact else torch.rand(N, groups) + 0.1
        zeros = torch.randint(0, 2**bits, (N, groups)) + (0.0 if exact else 0.3)
        self.scale, self.zero = scale.to(table), zeros.to(table) if zero else None
        Q = 2 ** (act_bits - 1) - 1
        self.x = torch.randint(-Q, Q + 1, (M, K), dtype=torch.int8)
        self.x_sum = self.x.reshape(M, groups, self.group).int().sum(-1, dtype=torch.int32)
        self.x_scale = powers[torch.randint(4, (M,))] if exact else torch.rand(M) + 0.1
        self.shape = {
            "N": N, "K": K, "group": self.group, "bits": bits, "has_zero": int(zero),
            "table": int(half),
        }  # fmt: skip
        size = int(run(program, what="sizes", **self.shape)["bytes"])
        self.w = run(
            program, out={"w": (torch.uint8, (size,))}, what="prepack", **self.shape,
            packed=self.packed, scale=self.scale, zero=self.zero,
        )["w"]  # fmt: skip

    def case(self, **options) -> dict[str, object]:
        return {
            **self.shape, "M": self.M, "act_bits": self.act_bits, "x": self.x,
            "x_scale": self.x_scale, "x_sum": self.x_sum, "w": self.w, "rank": 0, "out_type": 0,
            **options,
        }  # fmt: skip

    def multiply(
        self, route: str | None = None, seed: int = 0, out: torch.dtype = torch.float32, **options
    ) -> tuple[Tensor, str]:
        if route is not None:
            options["route"] = ROUTES[route]
        options["out_type"] = OUT[out]
        got = run(
            self.program, seed, out={"y": (out, (self.M, self.N))}, what="run",
            **self.case(**options),
        )  # fmt: skip
        return got["y"], got["plan"]

    def reference(self, **options) -> Tensor:
        return reference.lowbit_gemm.lowbit_gemm(
            self.x, self.x_scale, self.x_sum, self.packed, self.scale, self.zero, self.bits,
            self.group, **options,
        )  # fmt: skip


# M, N, K, group, bits, act_bits, zero, half: what differs between them is said by the name.
GEMV = {
    "one token, one group": (1, 64, 128, 0, 4, 4, False, False),
    "odd rows and inputs": (1, 72, 96, 0, 4, 8, False, True),
    "many slabs": (2, 32, 5120, 128, 4, 4, False, True),
    "groups of 32, padded": (3, 16, 160, 32, 4, 4, False, False),
    "groups of 64, zeros": (4, 40, 576, 64, 4, 8, True, True),
    "zeros per channel": (2, 24, 256, 0, 4, 4, True, False),
    "two bits": (1, 48, 384, 64, 2, 4, False, True),
    "two bits, padded, zeros": (4, 48, 96, 32, 2, 8, True, False),
    "two bits per channel": (2, 16, 352, 0, 2, 8, False, False),
    "three bits": (1, 32, 256, 128, 3, 3, False, False),
}
MMA = {
    "one tile of tokens": (5, 64, 256, 128, 4, 4, False, True),
    "two tiles, odd rows": (13, 72, 512, 64, 4, 8, False, False),
    "groups of 32, padded": (9, 64, 416, 32, 4, 4, False, True),
    "per channel, split": (8, 128, 1536, 0, 4, 8, False, False),
    "zeros per channel": (7, 64, 640, 0, 4, 4, True, True),
    "zeros": (24, 64, 576, 64, 4, 4, True, True),
    "two bits": (6, 80, 768, 64, 2, 4, False, True),
    "two bits, zeros": (33, 64, 320, 32, 2, 8, True, False),
    "three bits, two blocks of tokens": (70, 64, 256, 128, 3, 4, False, False),
}


@pytest.mark.parametrize(("name", "shape"), GEMV.items(), ids=GEMV.keys())
def test_gemv_equals_reference(program, name, shape) -> None:
    check(program, "gemv", shape)


@pytest.mark.parametrize(("name", "shape"), MMA.items(), ids=MMA.keys())
def test_mma_equals_reference(program, name, shape) -> None:
    check(program, "mma", shape)


def check(program: Path, route: str, shape: tuple, **device) -> None:
    M, N, K, group, bits, act_bits, zero, half = shape
    layer = Layer(program, M, N, K, bits, group, act_bits, zero, half)
    y, plan = layer.multiply(route, seed=M, **device)
    assert plan.startswith(route)
    assert torch.equal(y.double(), layer.reference()), plan


PREFILL = {
    "one tile, groups of 128": (65, 128, 256, 128, 4, 4, False, True),
    "ragged tiles, groups of 64": (130, 144, 320, 64, 4, 8, False, False),
    "groups of 32, zeros": (40, 72, 160, 32, 4, 4, True, False),
    "per channel": (70, 130, 384, 0, 4, 4, False, False),
    "two bits, zeros per channel": (50, 64, 256, 0, 2, 8, True, True),
    "two bits, groups of 64": (33, 80, 384, 64, 2, 4, False, True),
    "three bits": (20, 64, 96, 0, 3, 3, False, False),
}


@pytest.mark.parametrize(("name", "shape"), PREFILL.items(), ids=PREFILL.keys())
def test_tiles_before_hopper_equal_reference(program, name, shape) -> None:
    check(program, "sm80", shape, sm=80, shared_bytes=163 * 1024)


@pytest.mark.parametrize(("name", "shape"), PREFILL.items(), ids=PREFILL.keys())
def test_tiles_of_hopper_equal_reference(program, name, shape) -> None:
    check(program, "sm90", shape)


@pytest.mark.parametrize("group", [128, 0])
def test_high_tiles_of_hopper_and_several_a_block(program, group) -> None:
    """256 rows a tile, and fewer blocks than tiles: the pipeline runs on from tile to tile."""
    layer = Layer(program, 130, 520, 256, group=group, half=True)
    y, plan = layer.multiply("sm90", multiprocessors=2)
    assert "rows=256" in plan
    assert torch.equal(y.double(), layer.reference()), plan
