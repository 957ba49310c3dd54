"""BDQ's transforms are exact equivalences, and they flatten."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from saltire.models.adapters import adapter_for
from saltire.quant.recipe import RECIPES
from saltire.quant.transforms import input_diagonal, rotation
from saltire.reference.transform_quantize import hartley_matrix, quantize, transform
from tests.tiny import ARCHITECTURES, random_tokens, tiny_model


class TransformedLinear(nn.Module):
    """A linear computed in the transformed basis with nothing rounded, in float64."""

    def __init__(self, linear: nn.Linear, recipe) -> None:
        super().__init__()
        self.hadamard, self.left = rotation(linear.in_features, recipe)
        self.D = input_diagonal(torch.rand(linear.in_features), torch.rand(linear.in_features))
        self.weight = transform(linear.weight, self.D, self.hadamard, self.left)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = transform(x, 1 / self.D, self.hadamard, self.left) @ self.weight.T
        return y if self.bias is None else y + self.bias


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["none", "block", "full"])
def test_transforms_alone_leave_the_model_unchanged(architecture, kind) -> None:
    model = tiny_model(architecture).double()
    tokens = random_tokens(model, 2, 24)
    want = model(tokens).logits
    recipe = replace(RECIPES["w4a4"], rotation=kind, block=32)
    names = adapter_for(model.config).linear_names(model)
    assert len(names) == 14
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, TransformedLinear(linear, recipe))
    torch.testing.assert_close(model(tokens).logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9, 12, 43, 86])
def test_hartley_is_orthonormal_symmetric_and_flat(size) -> None:
    H = hartley_matrix(size)
    torch.testing.assert_close(H @ H.T, torch.eye(size).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(H, H.T, rtol=0, atol=1e-12)
    assert H.abs().max() <= (2 / size) ** 0.5 + 1e-12


@pytest.mark.parametrize("K", [576, 1536, 4096, 11008, 14336, 96])
def test_a_full_rotation_covers_every_channel(K) -> None:
    B, left = rotation(K, RECIPES["w4a4"])
    assert B * (1 if left is None else left.shape[0]) == K
    spread = transform(torch.eye(K, dtype=torch.float32)[:1], hadamard=B, left=left)
    assert (spread.abs() > 1e-6).float().mean() > 0.9


def test_diagonal_balances_the_power_of_both_sides() -> None:
    rms_x, rms_w = torch.rand(64) * 10 + 0.1, torch.rand(64) + 0.1
    D = input_diagonal(rms_x, rms_w)
    ratio = (rms_x / D) / (rms_w * D)
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio))


def test_dead_channels_keep_a_diagonal_of_one() -> None:
    rms_x, rms_w = torch.tensor([1.0, 0.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 4.0])
    D = input_diagonal(rms_x, rms_w)
    assert D.isfinite().all()
    assert D[1] == D[2] == 1


def test_diagonal_then_rotation_rounds_better_than_either_alone() -> None:
    x = torch.randn(512, 256) * torch.exp(torch.randn(256) * 1.5)
    w = torch.randn(64, 256) * torch.exp(torch.randn(256) * 0.3)
    want = x.double() @ w.double().T

    def error(diagonal: bool, rotate: bool) -> float:
        D = torch.ones(256).double()
        if diagonal:
            D = input_diagonal(x.square().mean(0).sqrt(), w.square().mean(0).sqrt())
        B = 256 if rotate else 1
        codes, scale, _ = quantize(transform(x, 1 / D, B), 4)
        w_codes, w_scale, _ = quantize(transform(w, D, B), 4)
        got = (codes.double() * scale[:, None]) @ (w_codes.double() * w_scale[:, None]).T
        return float((got - want).norm() / want.norm())

    both = error(True, True)
    assert both < 0.6 * error(True, False)
    assert both < 0.6 * error(False, True)
