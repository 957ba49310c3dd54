"""Whether numbers are all finite."""

from __future__ import annotations

import pytest
import torch

from saltire.quant.finite import all_finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bad_number_anywhere_is_seen(value: float, dtype: torch.dtype) -> None:
    for place in (0, 517, 999):
        x = torch.randn(1000).to(dtype)
        assert all_finite(x)
        x[place] = value
        assert not all_finite(x.reshape(10, 100))
        assert not all_finite(x.reshape(10, 100).T)


def test_nothing_is_finite() -> None:
    assert all_finite(torch.empty(0, 5))
