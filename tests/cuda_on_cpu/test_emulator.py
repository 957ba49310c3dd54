"""The emulator itself: tensor-core instructions against plain loops, and every bug it must find."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.cuda_on_cpu.emulate import CSRC, EMULATOR, EmulatorError, build, run


@pytest.fixture(scope="module")
def program() -> Path:
    return build("selftest")


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers [rows, K] to words of ``bits`` each, lowest first."""
    per_word = 32 // bits
    fields = (values.long() & (2**bits - 1)).reshape(values.shape[0], -1, per_word)
    words = (fields << (torch.arange(per_word) * bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [4, 8])
def test_integer_mma_equals_plain_loops(program, bits, seed) -> None:
    K = 4 * 32 if bits == 8 else 4 * 64
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    a, b = torch.randint(low, high, (16, K)), torch.randint(low, high, (8, K))
    got = run(
        program, seed, out={"d": (torch.int32, (16, 8))}, what="mma", type=f"s{bits}",
        a=pack(a, bits), b=pack(b, bits), words=K * bits // 32,
    )  # fmt: skip
    assert torch.equal(got["d"].long(), a @ b.T)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_float_mma_equals_plain_loops(program, name, dtype) -> None:
    a, b = torch.randn(16, 64).to(dtype), torch.randn(8, 64).to(dtype)
    got = run(
        program, out={"d": (torch.float32, (16, 8))}, what="mma", type=name, a=a, b=b, words=32
    )
    torch.testing.assert_close(got["d"], a.float() @ b.float().T, rtol=1e-5, atol=1e-5)


def test_ldmatrix_hands_out_operands_and_transposes(program) -> None:
    tile = torch.randint(-(2**15), 2**15, (4, 8, 8), dtype=torch.int16)
    for transposed in (0, 1):
        got = run(
            program, out={"out": (torch.int16, (4, 32, 2))}, what="matrices",
            **{"in": tile}, transposed=transposed,
        )  # fmt: skip
        want = tile.transpose(1, 2) if transposed else tile
        assert torch.equal(got["out"].reshape(4, 8, 8), want)


@pytest.mark.parametrize("seed", range(4))
def test_last_block_sees_what_all_blocks_wrote(program, seed) -> None:
    x = torch.randint(-8, 8, (5, 256)).float()
    got = run(
        program, seed, out={"partial": (torch.float32, (5,)), "total": (torch.float32, (1,))},
        zeros={"counter": 4}, what="sum", x=x, blocks=5,
    )  # fmt: skip
    assert torch.equal(got["partial"], x.sum(1))
    assert got["total"] == x.sum()


def share(program: Path, rows: torch.Tensor, seed: int, hurry: int) -> torch.Tensor:
    out = {"out": (torch.int8, (2, 128, 8, 16))}
    return run(program, seed, out, what="share", rows=rows, hurry=hurry)["out"]


@pytest.mark.parametrize("seed", range(4))
def test_a_box_for_both_blocks_of_a_cluster_reaches_both(program, seed) -> None:
    rows = torch.randint(-128, 128, (128, 8, 16), dtype=torch.int8)
    places = torch.arange(8) ^ (torch.arange(128) % 8)[:, None]
    swizzled = rows.gather(1, places[:, :, None].expand(-1, -1, 16))
    assert torch.equal(share(program, rows, seed, 0), torch.stack([swizzled, swizzled]))


@pytest.mark.parametrize("seed", range(4))
def test_a_block_of_a_cluster_that_ends_too_early_is_found(program, seed) -> None:
    rows = torch.zeros(128, 8, 16, dtype=torch.int8)
    with pytest.raises(EmulatorError, match="block of the cluster that has ended"):
        share(program, rows, seed, 1)


BUGS = {
    "reads beyond": (1, "reads outside of a buffer"),
    "writes before": (2, "writes outside of a buffer"),
    "reads unwritten": (3, "nobody has written"),
    "race in a block": (4, "race|nobody has written"),
    "race in a warp": (5, "race|nobody has written"),
    "race of blocks": (6, "race.*another block"),
    "reads before the copy is waited for": (7, "not delivered"),
    "reads another thread's copy without a barrier": (8, "race|not delivered"),
    "lanes execute different instructions": (9, "diverged"),
    "half a warp shuffles": (10, "deadlock.*all lanes to reach a shuffle"),
    "threads end before the barrier": (11, "deadlock|after some threads have ended"),
    "half a warp at a barrier": (12, "part of a warp"),
    "output left unwritten": (13, "nobody wrote"),
    "misaligned load": (14, "misaligned"),
    "copy never waited for": (15, "never waited"),
    "too much shared memory": (16, "bytes of shared memory"),
}


def run_buggy(program: Path, bug: int, seed: int) -> torch.Tensor:
    values = torch.arange(128, dtype=torch.int32)
    out = {"out": (torch.int32, (128,))}
    return run(program, seed, out=out, what="buggy", **{"in": values}, bug=bug, count=128)["out"]


@pytest.mark.parametrize("seed", range(3))
def test_a_kernel_without_bugs_passes(program, seed) -> None:
    blocks = torch.arange(128, dtype=torch.int32).reshape(2, 2, 32)
    assert torch.equal(run_buggy(program, 0, seed), blocks.flip(1).flatten())


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS.keys())
@pytest.mark.parametrize("seed", range(2))
def test_every_bug_is_found(program, bug, seed) -> None:
    number, message = bug
    with pytest.raises(EmulatorError, match=re.compile(message, re.DOTALL)):
        run_buggy(program, number, seed)


def test_host_code_that_touches_device_memory_is_found(program) -> None:
    with pytest.raises(EmulatorError, match="host code"):
        run(program, out={"out": (torch.int32, (1,))}, what="host")


@pytest.mark.parametrize(("header", "least"), [("ptx.h", 30), ("sm90.h", 15)])
def test_emulator_has_every_function_of_the_real_header(header, least) -> None:
    def functions(path: Path) -> set[str]:
        text = re.sub(r"//.*", "", path.read_text())
        found = re.findall(r"SALTIRE_DEVICE ([\w ]+?)\s*(\w+)\(([^)]*)\)", text)
        return {re.sub(r"\s+", " ", f"{a} {b}({c})") for a, b, c in found}

    real = functions(CSRC / "core" / "cuda" / header)
    assert len(real) >= least
    assert real == functions(EMULATOR / "include" / "core" / "cuda" / header)
