"""Linears in half precision through float32 products."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saltire.quant.float32_sums import float32_sums


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.mark.parametrize("rows", [1, 15, 16, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("narrow")
def test_a_half_precision_linear_is_the_exact_product_rounded_once(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(96, 32, bias=bias).to(torch.bfloat16))
    x = torch.randn(rows, 96).bfloat16()
    linear = layer[0]
    exact = x.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0.0)
    with float32_sums(layer):
        assert "forward" in vars(linear)
        assert layer(x).dtype == torch.bfloat16
        error = (layer(x).double() - exact).abs()
    assert "forward" not in vars(linear)
    assert (error <= exact.abs() * 2**-8 + 1e-5).all()


@pytest.mark.usefixtures("narrow")
def test_full_precision_and_other_layers_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    layers = nn.Sequential(nn.Linear(8, 8), Own(8, 8).to(torch.bfloat16))
    with float32_sums(layers):
        assert not any("forward" in vars(layer) for layer in layers)


def test_processors_with_their_own_instructions_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    layer = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16))
    with float32_sums(layer):
        assert "forward" not in vars(layer[0])


def test_an_error_within_puts_the_layers_back(narrow: None) -> None:
    layer = nn.Sequential(nn.Linear(8, 8).to(torch.bfloat16))
    with pytest.raises(KeyError), float32_sums(layer):
        raise KeyError
    assert "forward" not in vars(layer[0])
