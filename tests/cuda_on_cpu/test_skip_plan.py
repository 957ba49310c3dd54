"""skip_plan's CUDA kernel on the emulator, held to the specification."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saltire.reference import skip_plan as reference
from tests.cuda_on_cpu.emulate import build, run


@pytest.fixture(scope="module")
def program() -> Path:
    return build("skip_plan")


def select(program: Path, keep: Tensor, skip: Tensor, truth: Tensor, seed: int = 0, **more):
    M, D = keep.shape
    out = {
        "chosen": (torch.float32, (M, D)),
        "kept": (torch.uint8, (M,)),
        "cosine": (torch.float32, (M,)),
    }
    return run(program, seed, out, M=M, D=D, keep=keep, skip=skip, truth=truth, **more)


# D: one value; off every width; vectors; more than a step a thread, with and without vectors.
@pytest.mark.parametrize(
    ("M", "D", "plan"),
    [
        (1, 1, "threads=32 scalar"),
        (5, 77, "threads=96 scalar"),
        (15, 576, "threads=160 vector"),
        (2, 4100, "threads=1024 vector"),
        (2, 1501, "threads=1024 scalar"),
    ],
)
def test_choice_equals_the_reference(program, M, D, plan) -> None:
    keep, skip = torch.randn(2, M, D)
    truth = keep.mean(0) + skip.mean(0)
    got = select(program, keep, skip, truth, seed=D)
    chosen, kept, cosine = reference.skip_plan_select(keep, skip, truth)
    assert got["plan"] == plan
    assert torch.equal(got["chosen"], chosen)
    assert torch.equal(got["kept"], kept)
    torch.testing.assert_close(got["cosine"], cosine.float(), atol=1e-5, rtol=1e-5)


def test_rows_that_start_off_16_bytes(program) -> None:
    keep, skip = torch.randn(2, 3, 64)
    got = select(program, keep, skip, keep[0], skew_skip=4)
    assert got["plan"] == "threads=64 scalar"
    assert torch.equal(got["chosen"], reference.skip_plan_select(keep, skip, keep[0])[0])


def test_equal_states_count_as_skipped_and_zeros_have_cosine_zero(program) -> None:
    state = torch.randn(2, 640)
    got = select(program, state, state, state[0])
    assert got["kept"].tolist() == [0, 0]
    assert got["cosine"][0] == pytest.approx(1.0)
    zeros, ones = torch.zeros(1, 8), torch.ones(1, 8)
    assert select(program, zeros, ones, -torch.ones(8))["kept"].tolist() == [1]
    assert select(program, zeros, ones, torch.ones(8))["kept"].tolist() == [0]


def test_no_rows(program) -> None:
    empty = torch.zeros(0, 8)
    assert select(program, empty, empty, torch.ones(8))["chosen"].shape == (0, 8)
