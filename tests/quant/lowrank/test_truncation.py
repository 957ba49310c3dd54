"""Whitened truncation and the gauge between the factors: identities in double precision."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.quant.lowrank.dam import (
    apply_gauge,
    dam_diagonal,
    mixing_rotation,
    rms_of_ranks,
)
from saltire.quant.lowrank.truncation import Statistics, spectrum, truncate
from saltire.quant.recipe import GAUGES

SHAPES = [(48, 32), (32, 48), (40, 40)]  # tall, wide, square: N, K


def correlated(T: int, K: int) -> torch.Tensor:
    return (torch.randn(T, K) @ torch.randn(K, K) * torch.logspace(0, 1.5, K)).double()


def problem(N: int, K: int, T: int = 300) -> tuple[torch.Tensor, torch.Tensor, Statistics]:
    W, x = torch.randn(N, K).double(), correlated(T, K)
    return W, x, Statistics.of(x, damping=0.0)


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_the_error_is_the_power_of_the_ranks_left_out(N, K) -> None:
    W, x, statistics = problem(N, K)
    sigma = spectrum(W, statistics)
    for rank in (1, 7, min(N, K)):
        error = (x @ (W - truncate(W, statistics, rank).weight()).T).square().sum() / x.shape[0]
        want = sigma[rank:].square().sum()
        torch.testing.assert_close(error, want, rtol=1e-8, atol=1e-9 * float(sigma[0] ** 2))


@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_no_other_weight_of_that_rank_is_better(N, K) -> None:
    W, _, statistics = problem(N, K)
    best = statistics.norm(W - truncate(W, statistics, 5).weight())
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    assert best < statistics.norm(W - (U[:, :5] * S[:5]) @ V[:5])
    factors = truncate(W, statistics, 5)
    for _ in range(20):
        up = factors.up + 0.01 * torch.randn_like(factors.up)
        down = factors.down + 0.01 * torch.randn_like(factors.down)
        assert best <= statistics.norm(W - up @ down)


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_every_gauge_leaves_the_product_as_it_was(N, K, gauge) -> None:
    W, _, statistics = problem(N, K)
    full = apply_gauge(truncate(W, statistics, min(N, K)), statistics, gauge)
    assert float((full.weight() - W).norm() / W.norm()) < 1e-5  # full rank: W itself
    low = truncate(W, statistics, 8)
    again = apply_gauge(low, statistics, gauge)
    assert float((again.weight() - low.weight()).norm() / low.weight().norm()) < 1e-5


def test_an_error_in_one_factor_is_orthogonal_to_the_error_of_the_truncation() -> None:
    """In the metric of the inputs; so only the product of both factors' errors can interact."""
    W, x, statistics = problem(32, 48)
    low = truncate(W, statistics, 8)
    E_L = x @ (low.weight() - W).T
    d_up, d_down = torch.randn_like(low.up), torch.randn_like(low.down)
    size = E_L.norm()

    def inner(error: torch.Tensor) -> float:
        E = x @ error.T
        return abs(float((E_L * E).sum() / (size * E.norm())))

    assert inner(d_up @ low.down) < 1e-9
    assert inner(low.up @ d_down) < 1e-9
    assert inner(d_up @ d_down) > 1e-3


def test_after_the_diagonal_every_rank_carries_the_same_on_both_sides() -> None:
    W, _, statistics = problem(48, 32)
    z, up = rms_of_ranks(apply_gauge(truncate(W, statistics, 12), statistics, "closed"), statistics)
    ratio = up / z
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


def test_the_closed_form_is_the_balanced_split_where_whitening_is_exact() -> None:
    W, _, statistics = problem(48, 32)
    low = truncate(W, statistics, 12)
    closed, balanced = (apply_gauge(low, statistics, g) for g in ("closed", "balanced"))
    ratio = closed.down / balanced.down
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 10_000))
def test_no_diagonal_has_less_rounding_noise_than_the_closed_form(R, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, up = (torch.rand(R, generator=generator).double() + 0.01 for _ in range(2))

    def noise(d: torch.Tensor) -> float:
        return float((d * z).square().sum() * (up / d).square().sum())

    d = dam_diagonal(z, up)
    assert noise(d) == pytest.approx(float((z * up).sum() ** 2), rel=1e-9)
    other = d * (torch.randn(R, generator=generator).double() * 0.3).exp()
    assert noise(d) <= noise(other) * (1 + 1e-12)


def test_no_invertible_matrix_has_less_rounding_noise_than_the_diagonal() -> None:
    """In the basis of the whitened SVD; a rotation behind it changes peaks, not power."""
    W, _, statistics = problem(32, 48)
    low = apply_gauge(truncate(W, statistics, 10), statistics, "closed")

    def noise(factors) -> float:
        z, up = rms_of_ranks(factors, statistics)
        return float(z.square().sum() * up.square().sum())

    best = noise(low)
    assert noise(low.through(mixing_rotation(10))) == pytest.approx(best, rel=1e-9)
    for step in (0.01, 0.3):
        for _ in range(20):
            G = torch.eye(10).double() + step * torch.randn(10, 10).double()
            assert noise(low.through(G)) >= best * (1 - 1e-9)


@pytest.mark.parametrize("R", [1, 12, 32, 96, 160])
def test_the_rotation_of_the_ranks_is_orthogonal_and_even(R) -> None:
    rotation = mixing_rotation(R)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(R).double())
    assert float(rotation.abs().max()) <= (2 / R) ** 0.5 + 1e-12


def test_a_dead_rank_keeps_the_diagonal_finite() -> None:
    d = dam_diagonal(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert torch.isfinite(d).all()
    assert (d > 0).all()


@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_fewer_tokens_than_inputs_still_give_the_best_truncation(damping) -> None:
    W, x = torch.randn(24, 48).double(), correlated(10, 48)
    statistics = Statistics.of(x, damping)
    low = truncate(W, statistics, 10)
    assert torch.isfinite(low.weight()).all()
    # Ten tokens span ten directions: rank 10 loses nothing of what they show.
    assert float((x @ (W - low.weight()).T).norm() / (x @ W.T).norm()) < (
        1e-6 if damping == 0 else 0.1
    )


def test_inputs_that_are_all_zero_give_the_plain_svd() -> None:
    W = torch.randn(16, 24).double()
    low = truncate(W, Statistics.of(torch.zeros(5, 24)), 4)
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(low.weight(), (U[:, :4] * S[:4]) @ V[:4])


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_an_impossible_rank_is_refused_with_the_possible_ones(rank) -> None:
    W, _, statistics = problem(48, 32)
    with pytest.raises(SaltireError, match=rf"rank = {rank};.* 48 x 32 .*1 to 32"):
        truncate(W, statistics, rank)


def test_nan_statistics_are_refused() -> None:
    with pytest.raises(SaltireError, match="NaN"):
        Statistics.of(torch.full((4, 4), float("nan")))
