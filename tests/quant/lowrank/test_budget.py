"""Ranks out of one budget of bytes."""

from __future__ import annotations

import pytest
import torch

from saltire.errors import SaltireError
from saltire.quant.lowrank.budget import LayerSpectrum, allocate, branch_ranks


def spectrum(N: int, K: int, decay: float) -> LayerSpectrum:
    power = torch.logspace(0, -decay, min(N, K)).double()
    return LayerSpectrum(N, K, power / power.sum())


LAYERS = {
    "flat": spectrum(256, 256, 0.5),
    "steep": spectrum(256, 256, 4.0),
    "wide": spectrum(128, 512, 2.0),
    "small": spectrum(32, 256, 1.0),  # factors of rank 32 are larger than it is
}


def total(ranks: dict[str, int | None], bits: int = 4) -> int:
    return sum(
        LAYERS[n].whole_bytes(bits) if r is None else LAYERS[n].factored_bytes(r, bits)
        for n, r in ranks.items()
    )


def lost(ranks: dict[str, int | None]) -> float:
    return sum(float(LAYERS[n].power[r:].sum()) for n, r in ranks.items() if r is not None)


@pytest.mark.parametrize("share", [0.4, 0.6, 0.8, 0.95])
def test_the_budget_is_kept_and_nearly_used(share) -> None:
    w4 = sum(layer.w4_bytes() for layer in LAYERS.values())
    used = total(allocate(LAYERS, share, 4))
    assert used <= share * w4
    assert used > share * w4 - 0.2 * w4


def test_a_layer_smaller_than_its_factors_is_kept_whole() -> None:
    for share in (0.4, 0.8):
        assert allocate(LAYERS, share, 4)["small"] is None


def test_a_steep_spectrum_gets_fewer_ranks_than_a_flat_one_when_both_could_have_all() -> None:
    ranks = allocate(LAYERS, 0.7, 4)
    assert ranks["steep"] is not None
    assert ranks["flat"] is None or ranks["flat"] > ranks["steep"]


def test_greedy_loses_no_more_than_even_ranks_of_the_same_bytes() -> None:
    for even in (32, 64, 96):
        alike: dict[str, int | None] = dict.fromkeys(LAYERS, even)
        alike["small"] = None
        share = total(alike) / sum(layer.w4_bytes() for layer in LAYERS.values())
        assert lost(allocate(LAYERS, share + 1e-9, 4)) <= lost(alike) + 1e-12


def test_the_whole_budget_keeps_every_layer_whole() -> None:
    assert set(allocate(LAYERS, 1.0, 4).values()) == {None}


def test_an_impossible_budget_names_the_least_that_is_possible() -> None:
    with pytest.raises(SaltireError, match=r"a share of at least (0\.\d+)") as refused:
        allocate(LAYERS, 0.01, 4)
    least = float(str(refused.value).rpartition(" ")[2].rstrip("."))
    allocate(LAYERS, least, 4)
    with pytest.raises(SaltireError):
        allocate(LAYERS, least - 2e-4, 4)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_branches_keep_to_the_budget(bits) -> None:
    w4 = sum(layer.w4_bytes() for layer in LAYERS.values())
    ranks = branch_ranks(LAYERS, 0.8, 2, bits, 0)
    used = sum(
        LAYERS[n].whole_bytes(2) + (LAYERS[n].branch_bytes(r, bits) if r else 0)
        for n, r in ranks.items()
    )
    assert 0.72 * w4 < used <= 0.8 * w4
    assert all(r % 2 == 0 for r in ranks.values())


def test_a_budget_below_the_weights_alone_is_refused() -> None:
    with pytest.raises(SaltireError, match="weights alone take"):
        branch_ranks(LAYERS, 0.3, 2, 4, 0)
