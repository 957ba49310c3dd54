"""sequence: exact orders equal brute force, every ISA the same bits, searches near the best."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.ops import best_ordering, best_path, force_isa
from saltire.reference import sequence as reference


def matrix(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lengths(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 500, (n,), generator=generator).double()


# 1 and 2 fill no vector; 3 fills one of 8 subsets; 7 has one document above the table of low bits.
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("slope", [0.0, 1.0, -0.7])
def test_exact_ordering_equals_brute_force(isa, n, slope) -> None:
    for seed in range(5):
        w, length = matrix(n, seed), lengths(n, seed)
        _, want = reference.brute_force(
            n,
            lambda order: reference.ordering_value(w, order, length, slope),  # noqa: B023
        )
        got = best_ordering(w, length=length, slope=slope)
        assert got.value == pytest.approx(want, abs=1e-9)
        assert reference.ordering_value(w, got.order, length, slope) == pytest.approx(got.value)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_exact_path_equals_brute_force(isa, n) -> None:
    for seed in range(5):
        w = matrix(n, seed)
        _, want = reference.brute_force(n, lambda order: reference.path_value(w, order))  # noqa: B023
        got = best_path(w)
        assert got.value == pytest.approx(want, abs=1e-9)
        assert reference.path_value(w, got.order) == pytest.approx(got.value)


# Rows of one, two and three vectors; more documents than the table of low bits holds.
@pytest.mark.parametrize("n", [5, 8, 12, 16, 17])
def test_every_isa_finds_the_same_order(isa, n) -> None:
    w, length = matrix(n), lengths(n)

    def solve() -> list[object]:
        distance = best_ordering(w, length=length, slope=0.5)
        return [best_ordering(w), distance, best_path(w, exact=True)]

    with force_isa("ref"):
        want = solve()
    got = solve()
    assert got == want


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 10), st.integers(0, 2**32), st.sampled_from([0.0, 1.0, -1.0]))
def test_no_order_found_by_search_beats_the_exact_one(n, seed, slope) -> None:
    w, length = matrix(n, seed), lengths(n, seed)
    exact = best_ordering(w, length=length, slope=slope)
    found = best_ordering(w, length=length, slope=slope, exact=False, seed=seed)
    assert sorted(found.order) == list(range(n))
    assert found.value <= exact.value + 1e-9
    assert exact.value <= found.bound + 1e-9
    assert found.value == pytest.approx(
        reference.ordering_value(w, found.order, length, slope), abs=1e-9
    )
    path, searched = best_path(w, exact=True), best_path(w, exact=False, seed=seed)
    assert sorted(searched.order) == list(range(n))
    assert searched.value <= path.value + 1e-9 <= searched.bound + 2e-9
    assert searched.value == pytest.approx(reference.path_value(w, searched.order), abs=1e-9)


@pytest.mark.parametrize("slope", [0.0, 1.0, -1.0])
def test_search_finds_the_optimum_of_twelve_documents(slope) -> None:
    for seed in range(10):
        w, length = matrix(12, seed).abs(), lengths(12, seed)
        exact = best_ordering(w, length=length, slope=slope)
        found = best_ordering(w, length=length, slope=slope, exact=False)
        assert found.value == pytest.approx(exact.value, rel=1e-9)
        assert best_path(w, exact=False).value == pytest.approx(best_path(w).value, rel=1e-9)


def test_a_hidden_order_is_recovered_by_search() -> None:
    n = 64
    hidden = torch.randperm(n)
    place = torch.argsort(hidden)
    forward = (place[:, None] < place[None, :]).double()
    w = forward + 0.5 * matrix(n).abs()
    assert best_ordering(w, seed=3).order == hidden.tolist()
    chain = torch.zeros(n, n, dtype=torch.float64)
    chain[hidden[:-1], hidden[1:]] = 1
    assert best_path(chain + 0.3 * torch.rand(n, n)).order == hidden.tolist()


def test_the_same_seed_gives_the_same_order() -> None:
    w = matrix(40)
    assert best_ordering(w, seed=5) == best_ordering(w, seed=5)
    assert best_path(w, seed=5) == best_path(w, seed=5)


def test_equal_weights_keep_the_given_order(isa) -> None:
    for n in (1, 4, 9):
        assert best_ordering(torch.zeros(n, n)).order == list(range(n))
        assert best_path(torch.zeros(n, n)).order == list(range(n))


def test_transposing_reverses_the_optimum(isa) -> None:
    w = matrix(10)
    assert best_ordering(w.T).order == best_ordering(w).order[::-1]
    assert best_path(w.T).order == best_path(w).order[::-1]


def test_a_symmetric_matrix_has_no_direction() -> None:
    w = matrix(9)
    w = w + w.T
    assert best_ordering(w).value == pytest.approx(float(w.triu(1).sum()))


def test_the_diagonal_is_not_read(isa) -> None:
    w = matrix(8)
    noisy = w.clone().fill_diagonal_(float("nan"))
    assert best_ordering(noisy) == best_ordering(w)
    assert best_path(noisy) == best_path(w)


@pytest.mark.parametrize(
    ("w", "options", "message"),
    [
        (torch.zeros(2, 3), {}, "square"),
        (torch.zeros(0, 0), {}, "square"),
        (torch.zeros(25, 25), {"exact": True}, "at most 2"),
        (torch.tensor([[0.0, float("inf")], [0.0, 0.0]]), {}, "not finite"),
        (torch.zeros(3, 3), {"exact": False, "starts": 0}, "at least 1 start"),
    ],
)
def test_bad_matrices_are_refused(w, options, message) -> None:
    for solve in (best_ordering, best_path):
        with pytest.raises(SaltireError, match=message):
            solve(w, **options)


def test_bad_lengths_are_refused() -> None:
    with pytest.raises(SaltireError, match="positive"):
        best_ordering(torch.zeros(2, 2), length=torch.tensor([1.0, 0.0]))
    with pytest.raises(SaltireError, match="dimension 0"):
        best_ordering(torch.zeros(2, 2), length=torch.ones(3))


def test_opcheck() -> None:
    w, length = matrix(5), lengths(5)
    check = torch.library.opcheck
    check(torch.ops.saltire.sequence_exact_ordering.default, (w, length, 0.5))
    check(torch.ops.saltire.sequence_exact_path.default, (w,))
    check(torch.ops.saltire.sequence_search_ordering.default, (w, length, 0.5, 2, 3, 1))
    check(torch.ops.saltire.sequence_search_path.default, (w, 2, 3, 1))
