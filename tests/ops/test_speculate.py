"""Draws and acceptance: the law of what comes out, by exact enumeration and by counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.ops import draw_tokens, speculate_verify, warp_logits
from saltire.reference import speculate as reference


def random_logits(rows: int, V: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("V", [1, 5, 16, 1000, 49152])
@pytest.mark.parametrize(
    "settings_",
    [(1.0, 0, 1.0, 0.0), (0.7, 20, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (0.8, 50, 0.95, 0.05)],
    ids=["plain", "top-k", "top-p", "all"],
)
def test_warped_distributions_equal_the_reference(V: int, settings_, isa: str) -> None:
    logits = random_logits(3, V)
    expected = reference.warp_logits(logits, *settings_)
    torch.testing.assert_close(warp_logits(logits, *settings_), expected, atol=1e-6, rtol=1e-4)


def test_transformers_warps_alike() -> None:
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = random_logits(4, 300)
    warped = logits
    for step in (
        TemperatureLogitsWarper(0.8),
        TopKLogitsWarper(40),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.02),
    ):
        warped = step(None, warped)
    expected = warped.softmax(-1)
    torch.testing.assert_close(warp_logits(logits, 0.8, 40, 0.9, 0.02), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.integers(2, 40))
def test_top_p_keeps_the_fewest_that_reach_it(seed: int, top_p: float, V: int) -> None:
    logits = random_logits(1, V, seed)
    p = logits.double().softmax(-1)[0]
    kept = warp_logits(logits, top_p=top_p)[0] > 0
    assert p[kept].sum() >= top_p - 1e-6
    assert p[kept].sum() - p[kept].min() < top_p + 1e-6
    assert kept.all() or p[kept].min() >= p[~kept].max()


def test_draws_follow_the_distribution() -> None:
    n = 100_000
    p = warp_logits(random_logits(1, 12))
    tokens = draw_tokens(p.expand(n, -1), torch.zeros(n, dtype=torch.int64), torch.arange(n), 7)
    counts = torch.bincount(tokens, minlength=12).double()
    chi = ((counts - n * p[0].double()) ** 2 / (n * p[0].double())).sum()
    assert chi < 31.3  # 11 degrees of freedom, p = 0.001


def test_a_draw_depends_on_its_own_counter_only() -> None:
    p = warp_logits(random_logits(6, 50))
    sequences, positions = torch.arange(6), torch.arange(6) * 3
    together = draw_tokens(p, sequences, positions, 11)
    for i in range(6):
        assert (
            draw_tokens(p[i : i + 1], sequences[i : i + 1], positions[i : i + 1], 11)
            == (together[i])
        )
    assert not torch.equal(together, draw_tokens(p, sequences, positions, 12))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "certain"])
def test_accepted_and_replaced_tokens_have_the_targets_law(batch: int, certain: bool) -> None:
    """100,000 rounds: the first emitted token by chi-square against p."""
    V, rounds = 6, 100_000 // batch
    p, q = (warp_logits(random_logits(1, V, seed))[0] for seed in (1, 2))
    counts = torch.zeros(V, dtype=torch.float64)
    ones, sequences = torch.ones(batch, dtype=torch.int64), torch.arange(batch)
    for i in range(rounds):
        positions = torch.full((batch,), 2 * i)
        drafts = (
            torch.full((batch,), 3)
            if certain
            else draw_tokens(q.expand(batch, -1), sequences, positions, 5, draft=True)
        )
        accepted, following = speculate_verify(
            p.expand(2 * batch, -1),
            None if certain else q.expand(batch, -1),
            drafts,
            ones,
            sequences,
            positions,
            5,
        )
        first = torch.where(accepted == 1, drafts, following)
        counts += torch.bincount(first, minlength=V)
    n = rounds * batch
    chi = ((counts - n * p.double()) ** 2 / (n * p.double())).sum()
    assert chi < 20.5  # 5 degrees of freedom, p = 0.001


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_the_law_of_acceptance_is_the_targets_by_enumeration(seed: int, V: int) -> None:
    p, q = (warp_logits(random_logits(1, V, seed + i), top_p=0.9)[0] for i in (0, 1))
    torch.testing.assert_close(
        reference.emitted_distribution(p, q), p.double(), atol=1e-6, rtol=1e-6
    )


def test_equal_distributions_accept_everything() -> None:
    p = warp_logits(random_logits(4, 30))
    drafts = draw_tokens(p[:3], torch.zeros(3, dtype=torch.int64), torch.arange(3), 1, draft=True)
    zero = torch.tensor([0])
    accepted, following = speculate_verify(p, p[:3], drafts, torch.tensor([3]), zero, zero, 1)
    assert accepted.tolist() == [3]
    assert 0 <= following.item() < 30


def test_a_rejected_draft_is_never_emitted_in_its_place() -> None:
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    q = torch.tensor([[1.0, 0.0]])
    zero = torch.tensor([0])
    accepted, following = speculate_verify(p, q, zero, torch.tensor([1]), zero, zero, 3)
    assert accepted.tolist() == [0]
    assert following.tolist() == [1]


def test_bad_input_is_named() -> None:
    logits = random_logits(2, 8)
    with pytest.raises(SaltireError, match="temperature = 0"):
        warp_logits(logits, 0.0)
    with pytest.raises(SaltireError, match="top_p = 0"):
        warp_logits(logits, top_p=0.0)
    logits[1] = -torch.inf
    with pytest.raises(SaltireError, match="row 1 of logits is all -inf"):
        warp_logits(logits)
    logits[1] = torch.nan
    with pytest.raises(SaltireError, match="row 1"):
        warp_logits(logits)
    zero = torch.tensor([0])
    p = torch.full((2, 4), 0.25)
    with pytest.raises(SaltireError, match="token 9; the target's vocabulary has 4"):
        speculate_verify(p, None, torch.tensor([9]), torch.tensor([1]), zero, zero, 0)


def test_schemas_are_kept() -> None:
    p, zero = torch.full((2, 4), 0.25), torch.tensor([0])
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.saltire
    torch.library.opcheck(ops.warp_logits.default, (p, 1.0, 0, 0.9, 0.0), test_utils=checks)
    two = torch.tensor([0, 1])
    torch.library.opcheck(ops.draw_tokens.default, (p, two, two, 3, False), test_utils=checks)
    torch.library.opcheck(
        ops.speculate_verify.default,
        (p, p[:1], zero, torch.tensor([1]), zero, zero, 3),
        test_utils=checks,
    )
