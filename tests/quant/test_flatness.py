"""Flatness: zero for constant magnitude, larger with outliers, blind to scale and sign."""

from __future__ import annotations

import math

import pytest
import torch

from saltire.quant.flatness import flatness_entropy, flatness_meanabs

BOTH = pytest.mark.parametrize("flatness", [flatness_entropy, flatness_meanabs])


def gaussian(m: int = 512, n: int = 768) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0))


@BOTH
def test_constant_magnitude_is_flat(flatness) -> None:
    assert flatness(gaussian().sign() * 3.0) == pytest.approx(0.0, abs=1e-9)


@BOTH
def test_scale_and_sign_do_not_matter(flatness) -> None:
    assert flatness(gaussian() * -7.5) == pytest.approx(flatness(gaussian()), rel=1e-6)


@BOTH
def test_an_outlier_channel_is_less_flat(flatness) -> None:
    W = gaussian()
    W[:, 3] *= 40.0
    W[5, 7] = 4000.0
    assert flatness(W) > flatness(gaussian()) + 0.05


def test_values_of_a_gaussian() -> None:
    """E[z² ln z²] = ln 2 + ψ(3/2) = 0.7296; E[p ln p] for p = z²π/2 is 1.855."""
    assert flatness_entropy(gaussian()) == pytest.approx(0.7296, abs=0.02)
    assert flatness_meanabs(gaussian()) == pytest.approx(1.855, abs=0.03)


def test_one_entry_alone_is_the_worst() -> None:
    W = torch.zeros(8, 16)
    W[2, 3] = 5.0
    assert flatness_entropy(W) == pytest.approx(math.log(8 * 16))
    assert math.isnan(flatness_entropy(torch.zeros(4, 4)))


def test_diagonals_cannot_hide_from_sinkhorn_balancing() -> None:
    W = gaussian()
    scaled = W * torch.linspace(0.1, 10, 512)[:, None] * torch.linspace(5, 0.2, 768)
    assert flatness_entropy(scaled) > flatness_entropy(W) + 0.3
    balanced = flatness_entropy(W, iterations=50)
    assert flatness_entropy(scaled, iterations=50) == pytest.approx(balanced, abs=1e-6)
