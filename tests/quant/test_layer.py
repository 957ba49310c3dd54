"""The statistics that rounding goes by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saltire import ops
from saltire.nn.linear_format import LinearFormat
from saltire.quant.layer import MOMENT_CHUNK, PANEL, round_weights, second_moment
from saltire.quant.recipes import RECIPES
from saltire.quant.transforms import Transform


@pytest.mark.parametrize("K", [32, PANEL, 2 * PANEL + 32])
def test_the_second_moment_is_that_of_the_rounded_input(K: int) -> None:
    x, diagonal = torch.randn(MOMENT_CHUNK + 100, K), torch.rand(K) + 0.1
    codes, scale, _ = ops.transform_quantize(x, 4, diag=1 / diagonal, hadamard=32, clip=0.9)
    rounded = codes.double() * scale.double()[:, None]
    H = second_moment(x, Transform(diagonal, 32), LinearFormat(4, 4, clip=0.9))
    assert torch.equal(H, H.T)
    want = rounded.T @ rounded
    assert (H - want).norm() < 1e-5 * want.norm()
    assert (H - want).abs().max() < 1e-4 * want.diagonal().max()


def test_without_clips_every_range_is_spanned() -> None:
    x, w = torch.randn(300, 64), torch.randn(48, 64)
    made = {clip: round_weights(x, w, replace(RECIPES["w4a4"], clip=clip), "w") for clip in (0, 1)}
    assert made[0].format.clip == 1
    assert made[1].format.clip < 1
    rotated = made[0].input.weights(w)
    torch.testing.assert_close(made[0].scale[:, 0], rotated.abs().amax(1) / 7)
    lost = [(made[clip].weight() @ x.T - w @ x.T).norm() for clip in (0, 1)]
    assert lost[1] < lost[0]
    assert (made[1].scale < made[0].scale).float().mean() > 0.5
