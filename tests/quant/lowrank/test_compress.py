"""A whole model: factors and branches, saved, loaded and bit-equal; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from saltire.errors import SaltireError
from saltire.models.saving import save_checkpoint
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.linear_format import FactoredFormat, LinearFormat, read_format
from saltire.nn.quant_embedding import QuantEmbedding
from saltire.nn.quant_linear import QuantLinear
from saltire.quant import RECIPES, quantize
from saltire.quant.lowrank import residual
from saltire.quant.lowrank.compress import kept_whole
from saltire.quant.recipe import LowRank
from tests.tiny import random_tokens, tiny_model

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def compressed(low_rank: LowRank, recipe: str = "w4a4", **overrides: object):
    model = tiny_model("llama", **{**SIZES, **overrides})
    tokens = random_tokens(model, 4, 64)
    chosen = replace(RECIPES[recipe], low_rank=low_rank)
    return quantize(model, None, chosen, tokens, batch=2), tokens


def modules(model, kind: type) -> dict[str, torch.nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


@torch.no_grad()
@pytest.mark.parametrize(
    "low_rank",
    [
        LowRank("factored", 0.8),
        LowRank("factored", 0.7, gauge="learned"),
        LowRank("factored", 0.8, gauge="down", quantise_first=True),
        LowRank("residual", 1.3),
        LowRank("residual", 1.5, branch_bits=8),
        LowRank("residual", 1.8, branch_bits=16),
    ],
    ids=lambda low_rank: f"{low_rank.kind}-{low_rank.gauge}-{low_rank.branch_bits}",
)
def test_saved_then_loaded_logits_are_bit_equal(tmp_path: Path, low_rank) -> None:
    model, tokens = compressed(low_rank)
    kind = FactoredQuantLinear if low_rank.kind == "factored" else QuantLinear
    assert modules(model, kind)
    want = model(tokens).logits
    save_checkpoint(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert modules(loaded, kind).keys() == modules(model, kind).keys()
    assert torch.equal(loaded(tokens).logits, want)
    save_checkpoint(loaded, None, tmp_path / "again")
    first, second = (tmp_path / side / "model.safetensors" for side in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_a_loaded_model_generates_what_the_original_generates(tmp_path: Path) -> None:
    model, _ = compressed(LowRank("factored", 0.8))
    save_checkpoint(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = random_tokens(model, 1, 5)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **settings), loaded.generate(prompt, **settings))


def test_factors_that_share_an_input_quantise_it_once() -> None:
    model, _ = compressed(LowRank("factored", 0.8))
    mlp = model.model.layers[0].mlp
    assert mlp.gate_proj.shared_input is mlp.up_proj.shared_input is not None


def test_layers_smaller_than_their_factors_are_kept_dense() -> None:
    model, _ = compressed(LowRank("factored", 0.8), intermediate_size=512)
    for block in model.model.layers:
        # 64 outputs of 128 inputs: 8,192 weights; two factors of rank 32 hold 6,144, of 64 12,288.
        projection = block.self_attn.k_proj
        assert isinstance(projection, QuantLinear) or projection.format.rank == 32


def test_how_many_layers_stay_whole_is_said(tmp_path: Path) -> None:
    model, _ = compressed(LowRank("factored", 0.8))
    save_checkpoint(model, None, tmp_path / "out")
    factored = len(modules(model, FactoredQuantLinear))
    whole = 2 * 7 + 1 - factored  # two blocks and the head
    said = kept_whole(tmp_path / "out")
    assert said.startswith(f"{factored} linears in two factors, {whole} whole")


def test_a_tied_head_and_its_embedding_are_each_rounded_in_their_own_way() -> None:
    model, tokens = compressed(LowRank("factored", 0.8))
    assert not model.config.tie_word_embeddings
    assert isinstance(model.lm_head, QuantLinear)
    assert isinstance(model.model.embed_tokens, QuantEmbedding)
    assert model(tokens).logits.isfinite().all()


def test_an_impossible_budget_changes_nothing() -> None:
    model = tiny_model("llama", **SIZES)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = replace(RECIPES["w4a4"], low_rank=LowRank("factored", 0.05))
    with pytest.raises(SaltireError, match="Give a share of at least"):
        quantize(model, None, recipe, random_tokens(model, 2, 32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_a_branch_brings_the_layer_closer_and_more_bits_in_it_closer_still() -> None:
    model = tiny_model("llama", **SIZES)
    tokens = random_tokens(model, 8, 64)
    want = model(tokens).logits

    def error(low_rank: LowRank | None) -> float:
        recipe = replace(RECIPES["w2a8"], head_bits=16, low_rank=low_rank)
        made = quantize(tiny_model("llama", **SIZES), None, recipe, tokens, batch=4)
        return float((made(tokens).logits - want).norm() / want.norm())

    plain, little, much = error(None), *(error(LowRank("residual", s)) for s in (0.8, 1.1))
    assert much < little < plain


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_factors_are_two_layers_one_after_the_other(dtype) -> None:
    model, _ = compressed(LowRank("factored", 0.8))
    layer = next(iter(modules(model, FactoredQuantLinear).values()))
    x = torch.randn(3, 50, layer.in_features).to(dtype)
    assert torch.equal(layer(x), layer.up(layer.down(x.float())).to(dtype))


@torch.no_grad()
def test_a_stored_branch_adds_its_own_product() -> None:
    model, _ = compressed(LowRank("residual", 1.3))
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(9, layer.in_features)
    whole = layer(x)
    low_rank = x @ layer.low_rank_in @ layer.low_rank_out
    layer.low_rank_in = torch.zeros_like(layer.low_rank_in)
    torch.testing.assert_close(whole - layer(x), low_rank, rtol=1e-3, atol=1e-4)


def test_a_factored_format_survives_its_dict_and_refuses_others() -> None:
    format = FactoredFormat(64, LinearFormat(hadamard=32), LinearFormat(act_bits=8))
    assert read_format(format.to_dict()) == format
    with pytest.raises(SaltireError, match="expected rank, down and up"):
        read_format({**format.to_dict(), "middle": {}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "sum"}, "kind = 'sum'"),
        ({"share": 0.0}, "share = 0.0"),
        ({"gauge": "log"}, "gauge = 'log'"),
        ({"branch_bits": 3}, "branch_bits = 3"),
    ],
)
def test_impossible_settings_are_refused(values, message) -> None:
    with pytest.raises(SaltireError, match=message):
        LowRank(**{"kind": "factored", "share": 0.8, **values})


@torch.no_grad()
def test_a_branch_knows_what_its_weight_lost(monkeypatch) -> None:
    """More turns of weight and branch leave less error, and the branch is what was fitted last."""
    x = torch.randn(600, 64) @ (torch.randn(64, 64) / 8 + torch.eye(64))
    recipe = replace(RECIPES["w2a8"], low_rank=LowRank("residual", 0.9, branch_bits=16))

    def error(turns: int) -> float:
        monkeypatch.setattr(residual, "TURNS", turns)
        torch.manual_seed(5)
        parent = nn.ModuleDict({"a": nn.Linear(64, 96, bias=False)})
        want = parent["a"](x)
        residual.residual_group(parent, ("a",), x, recipe, {"a": 16})
        return float((parent["a"](x) - want).norm() / want.norm())

    errors = [error(turns) for turns in (1, 2, 3)]
    assert errors[2] < 0.97 * errors[0]
    assert errors[1] < errors[0]
