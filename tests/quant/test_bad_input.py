"""Models, texts and layers that are odd or damaged: finite logits, a note, or a refusal by name."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from saltire.errors import SaltireError
from saltire.quant import RECIPES, Recipe, quantize
from saltire.quant.job import Job, run
from saltire.quant.lowrank.survey import survey
from saltire.quant.recipe import TRANSFORMS, Learning, LowRank
from tests.tiny import random_tokens, tiny_model, tiny_tokenizer

W4A4 = RECIPES["w4a4"]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
WAYS = {
    "plain": W4A4,
    "mixed": replace(W4A4, bits_per_weight=4.6),
    "factored": replace(W4A4, low_rank=LowRank("factored", 0.8)),
    "residual": replace(W4A4, low_rank=LowRank("residual", 1.3)),
}
QUANTIZE = importlib.import_module("saltire.quant.quantize")  # whose name the function hides
FEW = "calibration tokens for up to"


def block(model: PreTrainedModel, index: int) -> torch.nn.Module:
    return model.model.layers[index]


@torch.no_grad()
@pytest.mark.filterwarnings(f"ignore:.*{FEW}")
@pytest.mark.parametrize("case", ["zeros", "one token", "few tokens"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_odd_activations_give_finite_logits(transform, case) -> None:
    model = tiny_model("llama")
    tokens = random_tokens(model, 2, 64)
    if case == "zeros":
        block(model, 0).input_layernorm.weight.zero_()
        block(model, 1).post_attention_layernorm.weight.zero_()
        model.model.norm.weight.zero_()
    elif case == "one token":
        tokens = torch.full_like(tokens, 5)
    else:
        tokens = tokens[:, :5]
    learning = Learning(group_steps=2) if transform == "kronecker" else None
    recipe = replace(W4A4, transform=transform, learning=learning)
    quantize(model, None, recipe, tokens, batch=2)
    assert model(random_tokens(model, 1, 16, seed=1)).logits.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_fewer_tokens_than_channels_are_told_once(way) -> None:
    model = tiny_model("llama", **SIZES)
    with pytest.warns(UserWarning, match=FEW) as told:
        quantize(model, None, WAYS[way], random_tokens(model, 2, 32))
    (text,) = [str(w.message) for w in told if FEW in str(w.message)]
    assert text.startswith(f"64 {FEW} 256 inputs (model.layers.0.mlp.down_proj)")
    assert "Hessian is singular there, and the 1% that damps it" in text
    assert "more samples (--samples): at least 256 tokens" in text


def test_as_many_tokens_as_channels_are_not_remarked_upon() -> None:
    model = tiny_model("llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{FEW}")
        quantize(model, None, "w4a4", random_tokens(model, 3, 32))


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_tells_of_few_tokens_as_well(tmp_path: Path, stream) -> None:
    job = replace(stored(tmp_path, W4A4), stream=stream)
    with pytest.warns(UserWarning, match=FEW) as told:
        run(job)
    assert sum(f"16 {FEW} 96 inputs" in str(w.message) for w in told) == 1


def stored(folder: Path, recipe: Recipe) -> Job:
    """A model and a text on disk, and a job of 16 tokens."""
    tiny_model("llama", vocab_size=259).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return Job(str(folder / "model"), folder / "out", recipe, str(folder / "text.txt"), 2, 8)


@torch.no_grad()
@pytest.mark.filterwarnings(f"ignore:.*{FEW}")
@pytest.mark.parametrize("way", WAYS)
def test_nan_activations_name_the_block(way) -> None:
    model = tiny_model("llama", **SIZES)
    block(model, 1).input_layernorm.weight[3] = float("nan")
    names = " / ".join(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
    with pytest.raises(SaltireError, match=f"^{names}: the calibration activations hold NaN"):
        quantize(model, None, WAYS[way], random_tokens(model, 2, 32))


@torch.no_grad()
@pytest.mark.filterwarnings(f"ignore:.*{FEW}")
@pytest.mark.parametrize("way", WAYS)
def test_nan_weights_name_the_block(way) -> None:
    model = tiny_model("llama", **SIZES)
    block(model, 1).mlp.down_proj.weight[3, 4] = float("nan")
    with pytest.raises(SaltireError, match=r"^model\.layers\.1\.mlp\.down_proj: the weight holds"):
        quantize(model, None, WAYS[way], random_tokens(model, 2, 32))


@torch.no_grad()
@pytest.mark.parametrize("part", ["norm", "weight"])
def test_a_survey_names_the_block_that_holds_nan(part) -> None:
    model = tiny_model("llama")
    damaged = block(model, 1).input_layernorm if part == "norm" else block(model, 1).mlp.down_proj
    damaged.weight.fill_(float("nan"))
    with pytest.raises(SaltireError, match=r"^model\.layers\.1\..*: the .* NaN"):
        survey(model, random_tokens(model, 1, 32), W4A4, shares=(0.5,))


@torch.no_grad()
def test_a_damaged_model_cannot_write_its_own_text() -> None:
    model = tiny_model("llama", vocab_size=259)
    block(model, 1).input_layernorm.weight[3] = float("nan")
    with pytest.raises(SaltireError, match="its logits hold NaN or infinity"):
        quantize(model, tiny_tokenizer(), "w4a4", samples=2, length=16)


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("nothing may run before the layers are known to fit")


def test_groups_that_do_not_divide_are_refused_before_text_is_sampled(monkeypatch) -> None:
    model = tiny_model("llama", vocab_size=259)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(QUANTIZE, "calibration_tokens", refuse)
    with pytest.raises(SaltireError) as error:
        quantize(model, tiny_tokenizer(), replace(W4A4, group=64))
    assert str(error.value).startswith("model.layers.0.mlp.down_proj: K = 96 inputs cannot be cut")
    assert "groups of 32, 64, 128; choose 32, or 0 for one scale an output" in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("stream", [False, True])
def test_a_job_refuses_groups_that_do_not_divide_before_a_block_runs(
    tmp_path: Path, monkeypatch, stream
) -> None:
    job = replace(stored(tmp_path, replace(W4A4, group=64)), stream=stream)
    monkeypatch.setattr(QUANTIZE, "BlockRunner", refuse)
    with pytest.raises(SaltireError, match=r"layers\.0\.mlp\.down_proj: K = 96 inputs cannot"):
        run(job)


@torch.no_grad()
def test_groups_fit_where_a_budget_chooses_them() -> None:
    model = tiny_model("llama")  # down_proj has 96 inputs, so its weights get no groups of 64
    tokens = random_tokens(model, 2, 64)
    quantize(model, None, replace(W4A4, group=64, bits_per_weight=5.0), tokens)
    assert model(tokens).logits.isfinite().all()


def test_a_head_that_the_kernels_cannot_run_is_refused_first(monkeypatch) -> None:
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(48, 128, bias=False)
    monkeypatch.setattr(QUANTIZE, "BlockRunner", refuse)
    with pytest.raises(SaltireError, match="lm_head: K = 48 inputs; expected a multiple of 32"):
        quantize(model, None, "w4a4", random_tokens(model, 2, 64))


def test_a_quantised_model_says_with_which_recipe() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(model, 2, 64)
    quantize(model, None, "w4a8", tokens)
    with pytest.raises(SaltireError, match=r"already quantised to w4a8\. Start from the original"):
        quantize(model, None, "w4a4", tokens)
    del model.config.quantization_config
    with pytest.raises(SaltireError, match=r"already quantised\. Start from the original"):
        quantize(model, None, "w4a4", tokens)
