"""gptq_round: every instruction set gives one result, and it is GPTQ's."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from saltire import ops
from saltire.errors import SaltireError
from saltire.reference import gptq as reference


def problem(N: int, K: int, groups: int, bits: int, seed: int = 0) -> tuple:
    """w, order, factor, scale, zero, bits of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * K, K, generator=g) @ torch.randn(K, K, generator=g)
    H = (x.T @ x).double()
    order = torch.randperm(K, generator=g)
    H = H[order][:, order] + 0.01 * H.diagonal().mean() * torch.eye(K)
    factor = torch.linalg.cholesky(torch.linalg.inv(H), upper=True).float()
    w = torch.randn(N, K, generator=g)
    scale = w.reshape(N, groups, -1).abs().amax(-1) / (2 ** (bits - 1) - 0.5)
    zero = torch.full((N, groups), 2 ** (bits - 1) - 0.5 * (bits == 2))
    return w, order, factor, scale, zero, bits


def loss(codes: torch.Tensor, w, order, factor, scale, zero, bits) -> float:
    """The error that GPTQ makes small, tr(E H Eᵀ), by E U⁻¹."""
    grouped = codes.double().reshape(len(w), scale.shape[1], -1)
    rounded = ((grouped - zero.double()[..., None]) * scale.double()[..., None]).reshape(w.shape)
    error = (rounded - w.double())[:, order]
    return float((error @ torch.linalg.inv(factor.double())).square().sum())


@pytest.mark.parametrize(
    ("N", "K", "groups", "bits"),
    [(1, 1, 1, 4), (3, 5, 1, 4), (16, 32, 1, 2), (33, 66, 3, 4), (70, 64, 2, 3), (40, 130, 1, 8)],
)
def test_every_instruction_set_gives_the_codes_of_ref(isa, N, K, groups, bits) -> None:
    arguments = problem(N, K, groups, bits)
    codes = ops.gptq_round(*arguments)
    with ops.force_isa("ref"):
        assert torch.equal(codes, ops.gptq_round(*arguments))


def test_every_step_is_rounded_as_the_instruction_sets_agreed(isa) -> None:
    """A factor so strong that one last bit changes all that follows in its row."""
    g = torch.Generator().manual_seed(1)
    N, K = 512, 512
    w = torch.randn(N, K, generator=g) * 30
    factor = (0.3 * torch.randn(K, K, generator=g)).triu(1) + torch.eye(K)
    scale, zero = torch.ones(N, 1), torch.full((N, 1), 128.0)
    arguments = (w, torch.arange(K), factor, scale, zero, 8)
    codes = ops.gptq_round(*arguments)
    with ops.force_isa("ref"):
        assert torch.equal(codes, ops.gptq_round(*arguments))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("N", "K", "groups", "bits"), [(24, 96, 1, 4), (24, 96, 3, 2), (5, 33, 1, 3)]
)
def test_codes_are_those_of_the_reference_but_for_ties(seed, N, K, groups, bits) -> None:
    arguments = problem(N, K, groups, bits, seed)
    codes, want = ops.gptq_round(*arguments), reference.gptq_round(*arguments)
    # Where float32 tips one value over to the next code, all that follow in its row may differ.
    rows = (codes != want).any(1)
    assert rows.sum() <= 1 + N // 8
    assert loss(codes, *arguments) == pytest.approx(loss(want, *arguments), rel=2e-2)


def test_codes_do_not_depend_on_threads() -> None:
    arguments = problem(200, 64, 1, 4)
    want = ops.gptq_round(*arguments)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(ops.gptq_round(*arguments), want)
    finally:
        torch.set_num_threads(threads)


def test_views_are_taken_as_they_are() -> None:
    w, order, factor, scale, zero, bits = problem(8, 32, 1, 4)
    want = ops.gptq_round(w, order, factor, scale, zero, bits)
    assert torch.equal(ops.gptq_round(w.T.contiguous().T, order, factor, scale, zero, bits), want)


def test_no_rows_give_no_codes() -> None:
    w, order, factor, scale, zero, bits = problem(4, 32, 1, 4)
    assert ops.gptq_round(w[:0], order, factor, scale[:0], zero[:0], bits).shape == (0, 32)


def test_values_that_are_not_finite_give_codes_in_range() -> None:
    w, order, factor, scale, zero, bits = problem(4, 32, 1, 4)
    w[1, 3], w[2, 3] = float("nan"), float("inf")
    assert ops.gptq_round(w, order, factor, scale, zero, bits).max() < 16


def test_opcheck() -> None:
    w, order, factor, scale, zero, bits = problem(8, 32, 2, 4)
    opcheck(torch.ops.saltire.gptq_round, (w, order, factor.T.contiguous(), scale, zero, bits))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(4, 32, dtype=torch.float64)}, "expected float32"),
        ({1: torch.zeros(32, dtype=torch.int64)}, "every column of 0..31 once"),
        ({1: torch.arange(1, 33)}, "every column of 0..31 once"),
        ({1: torch.arange(31)}, "expected dimension 0 to be 32"),
        ({2: torch.eye(31)}, "expected dimension 0 to be 32"),
        ({3: torch.ones(4, 5)}, "divides K"),
        ({4: torch.ones(3, 1)}, "expected dimension 0 to be 4"),
        ({5: 9}, "expected 1 to 8"),
    ],
)
def test_bad_input_is_refused_by_name(change: dict, message: str) -> None:
    arguments = list(problem(4, 32, 1, 4))
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(SaltireError, match=message):
        ops.gptq_round(*arguments)
