"""Pass@k: the estimator has no bias."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.rl.passk import mean_pass_at_k, pass_at_k


@given(
    st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))
)
def test_equals_the_share_of_all_draws_with_a_right_one(case) -> None:
    n, c, k = case
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


@given(st.integers(1, 2000), st.data())
def test_rises_with_k_and_with_correct(n, data) -> None:
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    value = pass_at_k(n, c, k)
    assert 0 <= value <= 1
    if k < n:
        assert pass_at_k(n, c, k + 1) >= value - 1e-12
    if c < n:
        assert pass_at_k(n, c + 1, k) >= value - 1e-12
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)


def test_mean_leaves_out_prompts_with_too_few_samples() -> None:
    assert mean_pass_at_k([(4, 1), (2, 2)], [1, 4, 8]) == {1: pytest.approx(0.625), 4: 1.0}


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_impossible_counts_are_refused(n, c, k) -> None:
    with pytest.raises(SaltireError):
        pass_at_k(n, c, k)
