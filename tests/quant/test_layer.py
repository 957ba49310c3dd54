"""The statistics that rounding goes by."""

from __future__ import annotations

import pytest
import torch

from saltire import ops
from saltire.nn.linear_format import LinearFormat
from saltire.quant.layer import MOMENT_CHUNK, PANEL, second_moment


@pytest.mark.parametrize("K", [32, PANEL, 2 * PANEL + 32])
def test_the_second_moment_is_that_of_the_rounded_input(K: int) -> None:
    x = torch.randn(MOMENT_CHUNK + 100, K)
    codes, scale, _ = ops.transform_quantize(x, 4, clip=0.9)
    rounded = codes.double() * scale.double()[:, None]
    H = second_moment(x, LinearFormat(4, 4, clip=0.9))
    assert torch.equal(H, H.T)
    want = rounded.T @ rounded
    assert (H - want).norm() < 1e-5 * want.norm()
    assert (H - want).abs().max() < 1e-4 * want.diagonal().max()
