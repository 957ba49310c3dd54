"""skip_plan on a device against the CPU's op."""

from __future__ import annotations

import pytest
import torch

from saltire import ops

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(("M", "D"), [(1, 1), (5, 77), (15, 576), (40, 8192), (0, 64)])
def test_choice_is_the_cpus(M, D) -> None:
    keep, skip = torch.randn(2, M, D)
    truth = torch.randn(D)
    want = ops.skip_plan_select(keep, skip, truth)
    got = ops.skip_plan_select(keep.cuda(), skip.cuda(), truth.cuda())
    assert torch.equal(got[0].cpu(), want[0])
    assert torch.equal(got[1].cpu(), want[1])
    torch.testing.assert_close(got[2].cpu(), want[2], atol=1e-5, rtol=1e-5)


def test_equal_states_count_as_skipped() -> None:
    state = torch.randn(3, 576, device="cuda")
    assert ops.skip_plan_select(state, state, state[0])[1].tolist() == [0, 0, 0]
