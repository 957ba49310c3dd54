"""A cache of few bits: what it stores, what it costs, and that transformers sees the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from saltire.errors import SaltireError
from saltire.models.cache_argument import cache_argument
from saltire.models.decoder import build_decoder
from saltire.models.kv_rounding import kv_bits, rounded, set_kv_bits
from saltire.models.saving import save_checkpoint
from saltire.quant import RECIPES, quantize
from saltire.reference.kv_cache import read_heads, rotate_heads, round_heads
from tests.nn.test_decoder import TOKENS, decode_all, target_logits
from tests.tiny import ARCHITECTURES, random_tokens, tiny_model

DTYPES = {8: torch.uint8, 4: torch.uint4, 2: torch.uint2}


@given(st.integers(0, 2**31), st.sampled_from([16, 48, 64, 80, 128]), st.sampled_from([4, 8]))
def test_a_head_is_read_back_to_half_a_step(seed: int, d: int, bits: int) -> None:
    x = torch.randn(3, d, generator=torch.Generator().manual_seed(seed)) * 5 + 2
    codes, scale, low = round_heads(x, bits)
    assert int(codes.max()) < 2**bits
    # float16 rounds the ends of the grid and its step by 2^-11 of their sizes.
    slack = 0.51 * scale.float() + 2**-9 * x.abs().amax(-1, keepdim=True)
    assert ((read_heads(codes, scale, low) - x).abs() <= slack).all()


@pytest.mark.parametrize("d", [16, 48, 64])
def test_the_rotation_is_its_own_inverse_and_keeps_products(d: int) -> None:
    a, b = torch.randn(2, 5, d, dtype=torch.float64)
    torch.testing.assert_close(rotate_heads(rotate_heads(a)), a)
    torch.testing.assert_close((rotate_heads(a) * rotate_heads(b)).sum(-1), (a * b).sum(-1))


def test_heads_of_zeros_and_of_nan() -> None:
    x = torch.zeros(2, 64)
    x[1, 3] = torch.inf
    back = read_heads(*round_heads(x, 4))
    assert (back[0] == 0).all()
    assert back[1].isnan().all(), "an infinity went into the codes unmarked"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("head_dim", [16, 48])
def test_the_decoder_stores_what_the_reference_says(head_dim: int, bits: int, isa: str) -> None:
    """Codes lie in the layout of decoder_layer/op.h; a tie may fall the other way."""
    model = tiny_model("llama", head_dim=head_dim, num_hidden_layers=1)
    decoder = build_decoder(model)
    exact, coded = decoder.new_cache(1, 48), decoder.new_cache(1, 48, DTYPES[bits])
    for cache in (exact, coded):
        decoder.prefill(cache, [TOKENS[:33]])
    keys, values = exact.kv[0, 0, 0], exact.kv[0, 1, 0]  # [kv_heads, T, d], keys in blocks
    keys = keys.reshape(2, 3, head_dim, 16).transpose(2, 3).reshape(2, 48, head_dim)
    per = 8 // bits
    shifts = torch.arange(per, dtype=torch.uint8) * bits
    raw_keys = coded.kv[0, 0, 0].reshape(2, 3, head_dim // per, 16).transpose(2, 3)
    got_keys = (raw_keys[..., None] >> shifts) & (2**bits - 1)  # byte, then place in it
    raw_values = coded.kv[0, 1, 0].reshape(2, 48, head_dim // 16, 16 // per)
    got_values = ((raw_values[..., None] >> shifts) & (2**bits - 1)).transpose(-1, -2)
    for side, (x, got) in enumerate(((keys, got_keys), (values, got_values))):
        codes, scale, low = round_heads(rotate_heads(x[:, :33]), bits)
        got = got.reshape(2, 48, head_dim)[:, :33]
        difference = (got.int() - codes.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 0.01
        grids = coded.scales[0, side, 0, :, :, :33].float()
        torch.testing.assert_close(grids[:, 0], scale[..., 0].float(), atol=1e-6, rtol=2e-3)
        torch.testing.assert_close(grids[:, 1], low[..., 0].float(), atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_decoder_computes_what_transformers_computes(
    architecture: str, bits: int, isa: str
) -> None:
    model = tiny_model(architecture)
    plain = target_logits(model, TOKENS)[16:]
    set_kv_bits(model, bits)
    decoder = build_decoder(model)
    assert decoder.cache_dtype == DTYPES[bits]
    ours, theirs = decode_all(decoder, TOKENS, 17, None), target_logits(model, TOKENS)[16:]
    rounding = (theirs - plain).norm()
    assert rounding > 0, "nothing was rounded"
    # A code may fall the other way: far less than rounding itself costs.
    assert (ours - theirs).norm() < 0.1 * rounding + 1e-4 * plain.norm()


def test_more_bits_cost_less() -> None:
    model = tiny_model("qwen3")
    plain = target_logits(model, TOKENS)
    errors = []
    for bits in (2, 4, 8):
        set_kv_bits(model, bits)
        errors.append(float((target_logits(model, TOKENS) - plain).norm() / plain.norm()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0
    set_kv_bits(model, 16)
    assert torch.equal(target_logits(model, TOKENS), plain), "16 bits must take the rounding away"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_gives_the_plain_forwards_logits(kind: str) -> None:
    model = tiny_model("llama")
    set_kv_bits(model, 4)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=48)
    )
    given = {cache_argument(model): cache}
    pieces = [
        model(torch.tensor([TOKENS[a:b]]), use_cache=True, **given).logits[0]
        for a, b in ((0, 20), (20, 21), (21, 40))
    ]
    torch.testing.assert_close(
        torch.cat(pieces), target_logits(model, TOKENS), atol=1e-4, rtol=1e-4
    )


def test_memory_shrinks() -> None:
    decoder = build_decoder(tiny_model("llama", head_dim=64))
    full, half = decoder.new_cache(1, 64), decoder.new_cache(1, 64, torch.bfloat16)
    codes = {bits: decoder.new_cache(1, 64, dtype) for bits, dtype in DTYPES.items()}
    values = full.bytes // 4
    assert half.bytes == 2 * values
    for bits, cache in codes.items():
        # A grid of 4 bytes for the 64 values of a head.
        assert cache.bytes == values * bits // 8 + values // 64 * 4
        assert cache.bytes == cache.kv.nbytes + cache.scales.nbytes


@torch.no_grad()
def test_a_checkpoint_says_its_bits(tmp_path: Path) -> None:
    model = tiny_model("llama")
    tokens = random_tokens(model, 4, 32)
    quantize(model, None, "w4a4kv4", tokens, batch=2)
    assert RECIPES["w4a4kv4"].kv_bits == kv_bits(model) == 4
    save_checkpoint(model, None, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert kv_bits(loaded) == 4
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    set_kv_bits(loaded, 16)
    assert not torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_gradients_pass_through_the_rounding() -> None:
    x = torch.randn(3, 16, requires_grad=True)
    rounded(x, 4).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_other_bits_are_refused() -> None:
    with pytest.raises(SaltireError, match="kv_bits = 3; expected 2, 4, 8, or 16"):
        set_kv_bits(tiny_model("llama"), 3)
