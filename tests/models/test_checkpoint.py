"""Quantise, save, load: what comes back is what was made, in packed integers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from saltire.errors import SaltireError
from saltire.files import replacing_directory, replacing_file
from saltire.models.hf_quantizer import FORMAT_VERSION, SaltireConfig
from saltire.models.loading import load_model
from saltire.models.saving import check_destination, save_checkpoint
from saltire.nn.quant_linear import QuantLinear
from saltire.quant import quantize
from tests.tiny import ARCHITECTURES, random_tokens, tiny_model


def quantised(architecture: str = "llama", recipe: str = "w4a4", **overrides: object):
    model = tiny_model(architecture, **overrides)
    return quantize(model, None, recipe, random_tokens(model, 4, 32), batch=2)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4", "w2a4-g32", "w3a4"])
def test_saved_then_loaded_logits_are_bit_equal(tmp_path: Path, architecture, recipe) -> None:
    from dataclasses import replace

    from saltire.quant import RECIPES

    chosen = (
        replace(RECIPES["w2a4-g64"], group=32, zero_points=True)
        if recipe == "w2a4-g32"
        else RECIPES[recipe]
    )
    model = tiny_model(architecture)
    tokens = random_tokens(model, 4, 32)
    quantize(model, None, chosen, tokens, batch=2)
    want = model(tokens).logits
    save_checkpoint(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, QuantLinear)
    assert torch.equal(loaded(tokens).logits, want)


@torch.no_grad()
def test_widths_that_are_no_power_of_two_are_saved(tmp_path: Path) -> None:
    model = quantised(hidden_size=96, intermediate_size=160)
    assert model.model.layers[0].self_attn.q_proj.left is not None
    tokens = random_tokens(model, 2, 16)
    save_checkpoint(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_more_bits_stay_closer_to_the_original(architecture) -> None:
    model = tiny_model(architecture)
    tokens = random_tokens(model, 8, 32)
    want = model(tokens).logits

    def error(recipe: str) -> float:
        quantised = quantize(tiny_model(architecture), None, recipe, tokens, batch=4)
        return float((quantised(tokens).logits - want).norm() / want.norm())

    w8a8, w4a8, w4a4, w2a4 = (error(recipe) for recipe in ("w8a8", "w4a8", "w4a4", "w2a4"))
    assert 0 < w4a8 < 0.4
    assert 4 * w8a8 < w4a8 < w4a4 < w2a4


def test_files_hold_packed_integers_and_no_float_copy(tmp_path: Path) -> None:
    save_checkpoint(quantised(), None, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        name = "model.layers.0.mlp.down_proj.weight_packed"
        assert file.get_tensor(name).dtype == torch.uint8
        assert file.get_tensor(name).shape == (64, 96 // 2)
        assert "model.layers.0.mlp.down_proj.weight" not in list(file.keys())
        assert file.get_tensor("model.embed_tokens.weight_packed").dtype == torch.uint8
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
        assert "lm_head.weight" not in list(file.keys()), "the tied head is stored twice"


def test_a_loaded_model_saves_to_the_same_bytes(tmp_path: Path) -> None:
    save_checkpoint(quantised(), None, tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    loaded(random_tokens(loaded, 1, 4))
    save_checkpoint(loaded, None, tmp_path / "two")
    first, second = (tmp_path / side / "model.safetensors" for side in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()


def test_a_loaded_model_generates_what_the_original_generates(tmp_path: Path) -> None:
    model = quantised()
    save_checkpoint(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    prompt = random_tokens(model, 1, 5)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **settings), loaded.generate(prompt, **settings))


def test_layers_that_share_an_input_quantise_it_once() -> None:
    model = quantised()
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.shared_input is attention.v_proj.shared_input is not None
    assert attention.o_proj.shared_input is None


def test_a_newer_format_is_refused_with_the_cure(tmp_path: Path) -> None:
    save_checkpoint(quantised(), None, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    path.write_text(json.dumps(config))
    with pytest.raises(SaltireError, match="Upgrade saltire"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_config_survives_json() -> None:
    config = quantised().config.quantization_config
    again = SaltireConfig.from_dict(json.loads(config.to_json_string()))
    assert again.formats() == config.formats()


def test_an_unsupported_architecture_is_refused_by_name() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(SaltireError, match=r"'gpt2' is not supported.*llama, mistral, qwen2"):
        quantize(model, None, "w4a4", torch.zeros(1, 4, dtype=torch.long))


def test_a_quantised_model_is_not_quantised_again() -> None:
    model = quantised()
    with pytest.raises(SaltireError, match="already quantised"):
        quantize(model, None, "w4a4", random_tokens(model, 1, 4))


def test_unknown_recipes_are_refused_with_the_nearest_names() -> None:
    model = tiny_model("llama")
    with pytest.raises(SaltireError, match="Did you mean w4a4"):
        quantize(model, None, "w4a44", random_tokens(model, 1, 4))


def test_nan_weights_are_refused_naming_the_layer() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(SaltireError, match=r"self_attn\.v_proj: the weight holds NaN"):
        quantize(model, None, "w4a4", random_tokens(model, 2, 8))


def test_a_layer_whose_inputs_are_all_zero_is_still_quantised() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()  # o_proj sees nothing but zeros
    tokens = random_tokens(model, 2, 8)
    quantize(model, None, "w4a4", tokens)
    assert model(tokens).logits.isfinite().all()


def test_a_failed_save_leaves_the_old_checkpoint_whole(tmp_path: Path, monkeypatch) -> None:
    model, out = quantised(), tmp_path / "out"
    save_checkpoint(model, None, out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full_disk(directory: Path, **_: object) -> None:
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full_disk)
    with pytest.raises(SaltireError, match="No space left on device"):
        save_checkpoint(model, None, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "a temporary folder was left"


def test_a_kill_while_saving_leaves_the_old_checkpoint_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("old")

    def killed() -> None:
        with replacing_directory(tmp_path / "out") as directory:
            (directory / "config.json").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_folder_that_is_not_a_model_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SaltireError, match="not a model directory"):
        save_checkpoint(quantised(), None, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_an_unwritable_place_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaltireError, match=r"cannot write .*Choose another place"):
        check_destination(tmp_path / "file" / "out")
    check_destination(tmp_path / "new" / "out")
    assert list((tmp_path / "new").iterdir()) == [], "the trial left something behind"


def test_a_name_that_is_no_directory_is_refused_at_once_without_a_network(monkeypatch) -> None:
    def no_network(*_: object) -> None:
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    with pytest.raises(SaltireError, match="nosuch is no directory here"):
        load_model("nosuch")


def test_an_unwritable_file_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    def write() -> None:
        with replacing_file(tmp_path / "file" / "below") as path:
            path.write_text("x")

    with pytest.raises(SaltireError, match="cannot write"):
        write()
