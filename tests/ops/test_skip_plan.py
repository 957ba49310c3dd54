"""The fused choice of a layer against its specification."""

from __future__ import annotations

import pytest
import torch

from saltire.errors import SaltireError
from saltire.ops import skip_plan_select
from saltire.reference import skip_plan as reference


@pytest.mark.parametrize(("M", "D"), [(1, 1), (3, 16), (5, 77), (15, 576)])
def test_choice_equals_the_reference(M: int, D: int, isa: str) -> None:
    keep, skip = torch.randn(2, M, D, generator=torch.Generator().manual_seed(M))
    truth = keep.mean(0) + skip.mean(0)
    chosen, kept, cosine = skip_plan_select(keep, skip, truth)
    expected = reference.skip_plan_select(keep, skip, truth)
    assert torch.equal(chosen, expected[0])
    assert torch.equal(kept, expected[1])
    torch.testing.assert_close(cosine, expected[2].float(), atol=1e-5, rtol=1e-5)


def test_equal_states_count_as_skipped() -> None:
    state = torch.randn(2, 32)
    _, kept, cosine = skip_plan_select(state, state, state[0])
    assert kept.tolist() == [0, 0]
    assert cosine[0] == pytest.approx(1.0)


def test_a_state_of_zeros_has_cosine_zero() -> None:
    keep, skip = torch.zeros(1, 8), torch.ones(1, 8)
    assert skip_plan_select(keep, skip, -torch.ones(8))[1].tolist() == [1]
    assert skip_plan_select(keep, skip, torch.ones(8))[1].tolist() == [0]


def test_shapes_are_checked_and_schemas_kept() -> None:
    keep = torch.randn(2, 8)
    with pytest.raises(SaltireError, match="truth"):
        skip_plan_select(keep, keep, torch.randn(9))
    torch.library.opcheck(
        torch.ops.saltire.skip_plan_select.default,
        (keep, torch.randn(2, 8), torch.randn(8)),
        test_utils=("test_schema", "test_faketensor"),
    )
