"""Bits dealt out of a budget: kept to, spent where the loss minds, refused where too few."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for
from saltire.models.saving import save_checkpoint
from saltire.quant import RECIPES, quantize
from saltire.quant.mixed import FORMATS, GroupCost, deal, lost_power, output_gradients
from tests.tiny import random_tokens, tiny_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 32}


def test_finer_grids_lose_less() -> None:
    two, four, four_g64, eight = (lost_power(*format) for format in FORMATS)
    assert 0.25 > two > 4 * four > 4 * four_g64 > 0
    assert four_g64 > 100 * eight > 0


def test_bits_go_where_the_loss_minds() -> None:
    linear = torch.nn.Linear(256, 64)
    costs = {name: GroupCost.of([linear], minds) for name, minds in (("a", 1.0), ("b", 100.0))}
    small, middle = costs["a"].bytes[:2]
    assert small is not None
    assert middle is not None
    assert deal(costs, small + middle) == {"a": FORMATS[0], "b": FORMATS[1]}
    assert set(deal(costs, 10 * middle).values()) == {FORMATS[-1]}
    with pytest.raises(SaltireError, match=r"2-bit weights in groups of 64 take 2\.250"):
        deal(costs, 2 * small - 1)


def test_gradients_are_those_of_the_loss() -> None:
    """Against a difference quotient along an output's own direction."""
    model = tiny_model("llama", **SIZES)
    tokens = random_tokens(model, 1, 12)
    squares = output_gradients(model, adapter_for(model.config), tokens)
    assert len(squares) == 14
    name = "model.layers.1.mlp.down_proj"
    linear, step = model.get_submodule(name), 1e-3

    def loss(position: int, delta: float) -> float:
        def nudge(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[0, position, 7] += delta
            return output

        handle = linear.register_forward_hook(nudge)
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1].double()
        handle.remove()
        return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))

    slopes = [(loss(t, step) - loss(t, -step)) / (2 * step) for t in range(12)]
    expected = sum(slope**2 for slope in slopes) / 11  # eleven tokens are predicted
    assert float(squares[name][7]) == pytest.approx(expected, rel=0.02)
    assert all(p.requires_grad for p in model.parameters()), "what was learnable must stay so"


def test_a_budget_is_kept_and_more_of_it_is_better(tmp_path: Path) -> None:
    tokens = random_tokens(tiny_model("llama", **SIZES), 8, 32)
    want = tiny_model("llama", **SIZES)(tokens).logits.detach()
    errors = []
    for bits in (2.6, 3.6, 4.6, 7.0):
        model = tiny_model("llama", **SIZES)
        quantize(model, None, replace(RECIPES["w4a8"], bits_per_weight=bits), tokens, batch=4)
        with torch.no_grad():
            errors.append(float((model(tokens).logits - want).norm() / want.norm()))
        used = weights = 0
        for name, module in model.model.named_modules():
            if name.endswith("_proj"):
                packed, scale, _ = module.checkpoint_weight()
                used += packed.nbytes + scale.nbytes
                weights += module.in_features * module.out_features
        assert bits - (2.0 if bits > 5 else 0.7) < 8 * used / weights <= bits
    assert errors[0] > errors[1] > errors[2] > errors[3] > 0


def test_a_budget_in_megabytes_bounds_the_file(tmp_path: Path) -> None:
    model = tiny_model("llama", **SIZES)
    tokens = random_tokens(model, 4, 32)
    # The diagonals that transforms store are not counted: a few vectors, small in real models.
    budget = 0.062
    quantize(model, None, replace(RECIPES["w4a8"], budget_mb=budget), tokens, batch=4)
    size = save_checkpoint(model, None, tmp_path / "out")
    vectors = sum(m.diag.nbytes for m in model.modules() if getattr(m, "diag", None) is not None)
    header = 20_000
    assert 0.6 * budget * 1e6 < size <= budget * 1e6 + vectors + header
    model = tiny_model("llama", **SIZES)
    with pytest.raises(SaltireError, match="Give at least so many"):
        quantize(model, None, replace(RECIPES["w4a8"], budget_mb=0.01), tokens, batch=4)


def test_two_budgets_are_refused() -> None:
    with pytest.raises(SaltireError, match="expected one of them"):
        replace(RECIPES["w4a4"], bits_per_weight=3.0, budget_mb=100.0)
    with pytest.raises(SaltireError, match="low rank, which has a budget of its own"):
        replace(RECIPES["dam-80"], bits_per_weight=3.0)
