"""lowbit_gemm's CUDA kernels on the emulator, against the specification.

Scales and zeros that are powers of two and whole numbers make every float of the formula exact, so
results must equal the reference to the bit, in whatever order a kernel adds; other tests take
arbitrary scales and a tolerance.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saltire import reference
from tests.cuda_on_cpu.emulate import EmulatorError, build, run

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
    "eight bits per channel": (1, 40, 352, 0, 8, 8, False, False),
    "eight bits, many slabs, groups": (3, 32, 1280, 64, 8, 4, False, True),
    "eight bits, padded, zeros": (4, 48, 96, 32, 8, 8, True, False),
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
    "eight bits per channel, split": (8, 128, 1536, 0, 8, 8, False, False),
    "eight bits, zeros": (33, 72, 320, 32, 8, 4, True, True),
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
    "eight bits per channel": (70, 130, 384, 0, 8, 8, False, False),
    "eight bits, groups of 64, zeros": (33, 80, 320, 64, 8, 4, True, True),
    "eight bits, groups of 32": (20, 64, 160, 32, 8, 8, False, False),
}


@pytest.mark.parametrize(("name", "shape"), PREFILL.items(), ids=PREFILL.keys())
def test_tiles_before_hopper_equal_reference(program, name, shape) -> None:
    check(program, "sm80", shape, sm=80, shared_bytes=163 * 1024)


@pytest.mark.parametrize(("name", "shape"), PREFILL.items(), ids=PREFILL.keys())
def test_tiles_of_hopper_equal_reference(program, name, shape) -> None:
    check(program, "sm90", shape)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [128, 0])
def test_high_tiles_of_hopper_and_several_a_block(program, group, bits) -> None:
    """256 rows a tile, and fewer blocks than tiles: the pipeline runs on from tile to tile."""
    layer = Layer(program, 130, 520, 256, bits, group=group, half=True)
    y, plan = layer.multiply("sm90", multiprocessors=2)
    assert "rows=256" in plan
    assert torch.equal(y.double(), layer.reference()), plan


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "zero", "half"), [(0, False, False), (32, True, True)])
def test_prepack_undoes_itself_and_is_as_drawn(program, bits, group, zero, half) -> None:
    layer = Layer(program, 1, 72, 160, bits, group, zero=zero, half=half, exact=False)
    out = {
        "packed": (torch.uint8, tuple(layer.packed.shape)),
        "scale": (layer.scale.dtype, tuple(layer.scale.shape)),
        "zero": (layer.scale.dtype, tuple(layer.scale.shape) if zero else (0,)),
    }
    got = run(program, out=out, what="unprepack", **layer.shape, w=layer.w)
    assert torch.equal(got["packed"], layer.packed)
    assert torch.equal(got["scale"], layer.scale)
    assert layer.zero is None or torch.equal(got["zero"], layer.zero)
    # Row 10 = row g + 8 of the first tile with g = 2, input 55 = 16 + 4t + i of step 1 with t = 1
    # and i = 3.
    lane, code = 4 * 2 + 1, int(layer.codes[10, 55])
    if bits == 2:
        byte = int(layer.w[lane * 16 + 1 * 4 + 3])
        assert byte >> 6 == code ^ 2
    elif bits == 8:
        assert int(layer.w[512 + lane * 16 + 3 * 4 + 3]) == code ^ 128
    else:
        byte = int(layer.w[lane * 16 + 3 * 4 + 3])
        assert byte >> 4 == (code - (8 if bits == 4 else 4)) & 15


def test_worked_byte_of_the_device_layout(program) -> None:
    """The byte that csrc/lowbit_gemm/device_layout.h works out."""
    layer = Layer(program, 1, 64, 128)
    codes = torch.full((64, 128), 8, dtype=torch.uint8)
    codes[0, 0], codes[0, 16] = 9, 3
    packed = reference.lowbit_gemm.pack_weight(codes, 4)
    w = run(
        program, out={"w": (torch.uint8, (layer.w.numel(),))}, what="prepack", **layer.shape,
        packed=packed, scale=layer.scale,
    )["w"]  # fmt: skip
    assert w[0] == 0xB1
    assert w[: 64 * 128 // 2].count_nonzero() == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_lengths_tell_what_a_buffer_holds(program, bits) -> None:
    """No two kinds of one shape have the same length, nor one that the CPU's layout has."""
    for N, K, group in ((64, 128, 0), (64, 128, 32), (200, 576, 64), (4096, 4096, 128)):
        device, cpu = [], set()
        for table in (0, 1):
            for zero in (0, 1):
                shape = {"N": N, "K": K, "group": group or K, "bits": bits, "has_zero": zero,
                         "table": table}  # fmt: skip
                device.append(int(run(program, what="sizes", **shape)["bytes"]))
                tables = (4 - 2 * table) * (1 + zero) * (K // (group or K))
                cpu.add(64 + -(-N // 32) * 32 * (K * bits // 8 + tables))
        assert len(set(device)) == 4
        assert not cpu & set(device)


@pytest.mark.parametrize(
    ("route", "M", "group", "device"),
    [("gemv", 3, 64, {}), ("mma", 11, 128, {}), ("sm80", 21, 64, {"sm": 80}), ("sm90", 21, 64, {})],
)
@pytest.mark.parametrize("out", OUT)
def test_branch_bias_arbitrary_scales_and_dtypes(program, route, M, group, device, out) -> None:
    layer = Layer(program, M, 72, 256, group=group, half=True, zero=True, exact=False)
    R = 5
    options = {
        "bias": torch.randn(72),
        "low_rank_x": torch.randn(M, R),
        "low_rank_w": torch.randn(R, 72),
    }
    y, _ = layer.multiply(route, out=out, rank=R, **options, **device)
    want = layer.reference(**options)
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[out]
    assert (y.double() - want).norm() / want.norm() < bound


@pytest.mark.parametrize("seed", range(3))
def test_order_of_threads_does_not_matter(program, seed) -> None:
    layer = Layer(program, 6, 128, 2304, group=64, half=True, exact=False)
    first, plan = layer.multiply("mma", seed=0)
    assert "split" in plan
    assert torch.equal(layer.multiply("mma", seed=seed + 1)[0], first)


def test_damaged_tokens_stay_in_their_rows(program) -> None:
    layer = Layer(program, 3, 64, 128)
    layer.x_scale[1] = float("nan")
    for route in ("gemv", "mma", "sm90"):
        y, _ = layer.multiply(route)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]].double(), layer.reference()[[0, 2]])


@pytest.mark.parametrize(
    ("units", "stages", "workers"), [(64, 16, 24), (30, 3, 7), (8, 8, 3), (9, 3, 9)]
)
def test_workers_share_the_stream(program, units, stages, workers) -> None:
    got = run(program, what="stream", units=units, stages=stages, workers=workers)
    begins = [int(word) for word in got["begins"].split()]
    owners = [int(word) for word in got["owners"].split()]
    slots = [int(word) for word in got["slots"].split()]
    assert (begins[0], begins[-1]) == (0, units)
    shares = [b - a for a, b in pairwise(begins)]
    assert max(shares) - min(shares) <= 1
    assert owners == [w for w, share in enumerate(shares) for _ in range(share)]
    # Each part of a split block has a slot of its own: a worker's first (even) or last (odd).
    assert len(set(slots)) == len(slots)
    assert all(slot < 2 * workers for slot in slots)


H100 = {"sm": 90, "multiprocessors": 132, "shared_bytes": 227 * 1024}
A100 = {"sm": 80, "multiprocessors": 108, "shared_bytes": 163 * 1024}
RTX3090 = {"sm": 86, "multiprocessors": 82, "shared_bytes": 99 * 1024}
PLANS = [
    (H100, 1, 4096, 4096, 128, 4, "gemv rows=16 tokens=1 blocks=256x1 threads=256"),
    (H100, 3, 14336, 4096, 128, 4, "gemv rows=16 tokens=4 blocks=896x1 threads=256"),
    (H100, 16, 4096, 4096, 128, 4, "mma rows=64 tokens=16 blocks=256x1"),
    (H100, 64, 14336, 4096, 128, 8, "mma rows=64 tokens=64 blocks=132x1"),
    (H100, 128, 4096, 4096, 128, 8, "mma rows=64 tokens=64 blocks=66x2"),
    (H100, 4096, 8192, 8192, 128, 4, "sm90 rows=256 tokens=128 blocks=32x32 threads=384"),
    (H100, 4096, 8192, 8192, 64, 4, "sm90 rows=128 tokens=128 blocks=64x32 threads=384"),
    (H100, 512, 4096, 4096, 0, 4, "sm90 rows=128 tokens=128 blocks=32x4 threads=384"),
    (A100, 4096, 8192, 8192, 128, 4, "sm80 rows=128 tokens=128 blocks=64x32 threads=256"),
    (A100, 4096, 8192, 8192, 0, 8, "sm80 rows=128 tokens=128 blocks=64x32 threads=256"),
    (RTX3090, 64, 4096, 4096, 128, 8, "mma rows=64 tokens=32 blocks=41x2"),
]


@pytest.mark.parametrize(("device", "M", "N", "K", "group", "act_bits", "want"), PLANS)
def test_plans(program, device, M, N, K, group, act_bits, want) -> None:
    plan = run(
        program, what="plan", N=N, K=K, group=group or K, bits=4, has_zero=0, table=1, M=M,
        act_bits=act_bits, rank=0, out_type=2, **device,
    )["plan"]  # fmt: skip
    assert plan.startswith(want)
    assert int(plan.split("shared=")[1].split()[0]) <= device["shared_bytes"]
    if want.startswith("sm80"):
        assert plan.endswith(" s4" if act_bits == 4 else " s8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 96, "K": 192}, "expected 0 .per channel., 32, 64 or 128"),
        ({"K": 262144, "group": 262144, "act_bits": 8}, "exact only up to K = 132104"),
        ({"M": 5, "route": 0}, "gemv takes up to 4 tokens"),
        ({"sm": 89, "route": 3}, "sm90 runs on compute capability 9.0, not 89"),
        ({"sm": 90, "route": 2}, "sm80 runs on compute capability 8, not 90"),
    ],
)
def test_what_a_device_cannot_do_is_refused(program, options, message) -> None:
    case = {
        "N": 64, "K": 192, "group": 64, "bits": 4, "has_zero": 0, "table": 0, "M": 1,
        "act_bits": 4, "rank": 0, "out_type": 0, **options,
    }  # fmt: skip
    with pytest.raises(EmulatorError, match=message):
        run(program, what="plan", **case)
