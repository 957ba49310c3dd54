"""Embeddings in 8 and 4 bits, alone, in checkpoints and in the decoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder, build_device_decoder
from saltire.models.saving import save_checkpoint
from saltire.nn.decoder import Decoder
from saltire.nn.linear_format import read_format
from saltire.nn.quant_embedding import EmbeddingFormat, QuantEmbedding
from saltire.quant import RECIPES, quantize
from saltire.quant.embedding import round_embedding
from tests.tiny import random_tokens, tiny_model

W4A8 = RECIPES["w4a8"]
DECODERS = (
    build_decoder,
    partial(build_device_decoder, cache_dtype=torch.float32, dtype=torch.float32),
)


def embedding(V: int, D: int, seed: int = 0) -> nn.Embedding:
    torch.manual_seed(seed)
    made = nn.Embedding(V, D)
    made.weight.data *= torch.rand(V, 1) * 3
    return made


def last_logits(decoder: Decoder, prompt: list[int]) -> torch.Tensor:
    return decoder.prefill(decoder.new_cache(1, 64), [prompt]).logits[0]


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.sampled_from([32, 64, 96, 192]), st.sampled_from([4, 8]))
def test_a_value_is_off_by_at_most_half_a_step(V: int, D: int, bits: int) -> None:
    old = embedding(V, D)
    new = round_embedding(old, bits, "embed")
    group = new.format.group
    assert D % group == 0
    step = new.weight_scale.float().repeat_interleave(group, dim=1)
    error = (new.dequantized() - old.weight).abs()
    inside = old.weight.abs() <= step * (2 ** (bits - 1) - 1)
    assert (error <= 0.501 * step)[inside].all()
    if bits == 8:
        assert (error <= 0.51 * step).all()


def test_small_rows_keep_their_digits_and_rows_of_zeros_stay_zero() -> None:
    old = embedding(3, 64)
    old.weight.data[0] *= 1e-3 / old.weight[0].abs().max()
    old.weight.data[1] = 0
    new = round_embedding(old, 8, "embed").dequantized()
    assert (new[0] - old.weight[0]).abs().max() < 1e-3 / 100
    assert not new[1].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_looking_up_gives_the_rows(bits: int) -> None:
    new = round_embedding(embedding(50, 64), bits, "embed")
    ids = torch.tensor([[0, 49, 7], [7, 7, 3]])
    assert torch.equal(new(ids), new.dequantized()[ids])


def test_the_worked_byte_of_the_docstring() -> None:
    new = QuantEmbedding(1, 32, EmbeddingFormat(4, 32), torch.float32)
    new.weight_packed.fill_(0x3B)  # 11, then 3
    new.weight_scale.fill_(0.5)
    assert new(torch.tensor([0]))[0, :2].tolist() == [1.5, -2.5]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_checkpoints_keep_it_and_the_decoder_reads_it(
    tmp_path: Path, architecture: str, bits: int
) -> None:
    model = tiny_model(architecture)
    tokens = random_tokens(model, 4, 32)
    quantize(model, None, replace(W4A8, embedding_bits=bits), tokens, batch=2)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding) is (bits < 16)
    save_checkpoint(model, None, tmp_path / "out")
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as file:
        names = [name for name in file.keys() if "embed_tokens" in name]  # noqa: SIM118
    expected = ["weight"] if bits == 16 else ["weight_packed", "weight_scale"]
    assert sorted(name.rpartition(".")[2] for name in names) == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = loaded(tokens[:1]).logits[0]
    assert torch.equal(want, model(tokens[:1]).logits[0])
    # The decoders give what they give for an embedding that holds the same rows in float32.
    ours = [last_logits(build(loaded), tokens[0].tolist()) for build in DECODERS]
    old = loaded.get_input_embeddings()
    if isinstance(old, QuantEmbedding):
        loaded.set_input_embeddings(nn.Embedding.from_pretrained(old.dequantized()))
    for build, logits in zip(DECODERS, ours, strict=True):
        assert torch.equal(last_logits(build(loaded), tokens[0].tolist()), logits)


def test_a_head_that_stays_keeps_the_embedding_it_is_tied_to() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    quantize(model, None, replace(W4A8, head_bits=16), random_tokens(model, 4, 32), batch=2)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_bad_bits_and_bad_weights_are_refused() -> None:
    with pytest.raises(SaltireError, match="embedding_bits = 6"):
        replace(W4A8, embedding_bits=6)
    with pytest.raises(SaltireError, match="unknown fields"):
        read_format({"embedding_bits": 8, "group": 64, "colour": 1})
    with pytest.raises(SaltireError, match="groups of 64"):
        round_embedding(embedding(4, 40), 8, "embed")
    huge = embedding(4, 64)
    huge.weight.data[1, 3] = 1e8
    with pytest.raises(SaltireError, match="more than a float16 scale"):
        round_embedding(huge, 8, "embed")
    broken = embedding(4, 64)
    broken.weight.data[2, 5] = float("nan")
    with pytest.raises(SaltireError, match="embed holds NaN"):
        round_embedding(broken, 8, "embed")
