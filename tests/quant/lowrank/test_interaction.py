"""What holds of the two errors together, and the counter-examples to what does not."""

from __future__ import annotations

import pytest
import torch

from saltire.errors import SaltireError
from saltire.quant import RECIPES
from saltire.quant.layer import round_weights
from saltire.quant.lowrank import Statistics, interaction, truncate
from saltire.quant.lowrank.dam import apply_gauge
from saltire.quant.lowrank.interaction import quantised_factors
from saltire.quant.recipe import Recipe

PLAIN = Recipe("plain", 4, 8, transform="none")


def decaying(N: int, K: int) -> torch.Tensor:
    """A weight whose spectrum falls as those of language models do."""
    U, _ = torch.linalg.qr(torch.randn(N, min(N, K)))
    V, _ = torch.linalg.qr(torch.randn(K, min(N, K)))
    return (U * torch.logspace(1, -1, min(N, K))) @ V.T


@pytest.mark.parametrize("gauge", ["down", "balanced", "hadamard"])
def test_squared_errors_add_up_with_twice_the_inner_product(gauge) -> None:
    W, x = decaying(96, 64), torch.randn(400, 64)
    m = interaction(W, x, 32, "w4a4", gauge)
    assert m.lq**2 == pytest.approx(m.e_L**2 + m.e_factors**2 + 2 * m.inner, rel=1e-4)


def test_decompose_then_quantise_obeys_the_triangle_inequality_on_the_truncated_weight() -> None:
    m = interaction(decaying(64, 96), torch.randn(400, 96), 32, "w2a4")
    assert m.lq <= m.e_L + m.e_factors + 1e-6


def test_a_weight_on_the_grid_has_an_excess_though_each_error_alone_is_zero() -> None:
    """Counter-example to "errors at most add up": e_L = 0 (rank 32) and e_Q ≈ 0 (levels ±1)."""
    half = torch.where(torch.rand(64, 32) < 0.5, -1.0, 1.0)
    W = torch.cat([half, half], dim=1)  # rank 32, every entry a level of the grid
    x = torch.randint(-127, 128, (300, 64)).float()
    x[:, 0] = 127.0  # every token is on the grid of activations as well
    m = interaction(W, x, 32, PLAIN)
    assert m.e_L < 0.01
    assert m.e_Q < 0.01
    assert m.excess_lq > 0.03


def test_quantising_first_can_lose_more_than_both_errors_together() -> None:
    """diag(1, 0.9) at rank 1, on the grid {0, ±1}: rounding makes 0.9 the larger of the two."""
    W, Q_of_W = torch.tensor([1.0, 0.9]).diag(), torch.tensor([1.0, 1.001]).diag()
    statistics = Statistics.of_moment(torch.eye(2), damping=0.0)
    e_L = statistics.norm(W - truncate(W, statistics, 1).weight())
    e_Q = statistics.norm(W - Q_of_W)
    assert statistics.norm(W - truncate(Q_of_W, statistics, 1).weight()) > e_L + e_Q


def test_the_diagonal_changes_nothing_in_the_rounding_of_the_first_factor() -> None:
    """Its scales are per output, that is per rank: they take the diagonal up."""
    W, x = decaying(64, 64), torch.randn(200, 64)
    statistics = Statistics.of(x)
    low = truncate(W, statistics, 32)
    d = torch.logspace(-2, 2, 32).double()
    scaled = low.through(d.diag(), (1 / d).diag())
    plain, other = (round_weights(x, f.down.float(), PLAIN, "") for f in (low, scaled))
    assert (plain.packed != other.packed).float().mean() < 0.01  # ties of float32 products
    torch.testing.assert_close(
        plain.weight() * d[:, None].float(), other.weight(), rtol=0.1, atol=1e-3
    )


def test_dam_loses_less_than_either_plain_split_and_the_rotation_less_still() -> None:
    W, x = decaying(128, 96), torch.randn(600, 96) * torch.logspace(-0.5, 0.5, 96)
    error = {
        gauge: interaction(W, x, 64, "w4a4", gauge).lq
        for gauge in ("down", "up", "closed", "hadamard")
    }
    assert error["closed"] < error["down"]
    assert error["closed"] < error["up"]
    assert error["hadamard"] < error["closed"]


def test_with_eight_bit_activations_the_factors_give_the_truncated_weight() -> None:
    W, x = decaying(64, 96), torch.randn(400, 96)
    statistics = Statistics.of(x)
    low = truncate(W, statistics, 32)
    down, up = quantised_factors(x, apply_gauge(low, statistics, "hadamard"), RECIPES["w4a8"], "")
    want = x @ low.weight().float().T
    assert float((up(down(x)) - want).norm() / want.norm()) < 0.15


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, "ranks 1 to 64"), (96, "ranks 1 to 64"), (40, "Nearest: 32 or 64")],
)
def test_ranks_that_cannot_be_are_refused(rank, message) -> None:
    with pytest.raises(SaltireError, match=message):
        interaction(torch.randn(96, 64), torch.randn(50, 64), rank, "w4a4")


def test_outputs_that_are_all_zero_are_refused() -> None:
    with pytest.raises(SaltireError, match="all zero"):
        interaction(torch.zeros(64, 64), torch.randn(50, 64), 32, "w4a4")
