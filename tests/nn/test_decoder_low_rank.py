"""Layers of two factors and branches of low rank in nn.Decoder."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder
from saltire.nn.decoder import Decoder
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.linear_format import FactoredFormat, LinearFormat
from saltire.ops import force_isa
from saltire.quant import RECIPES, quantize
from saltire.quant.recipe import LowRank
from tests.conftest import AVAILABLE_ISAS
from tests.tiny import random_tokens, tiny_model

TOKENS = random_tokens(tiny_model("llama"), 1, 40)[0].tolist()


@functools.cache
def compressed(low_rank: LowRank, architecture: str = "llama", recipe: str = "w4a8"):
    model = tiny_model(architecture, hidden_size=128, intermediate_size=256, head_dim=32)
    chosen = replace(RECIPES[recipe], low_rank=low_rank)
    return quantize(model, None, chosen, random_tokens(model, 4, 64), batch=2)


def decode_all(
    decoder: Decoder, prompt: int, tokens: Sequence[int] = tuple(TOKENS)
) -> torch.Tensor:
    cache = decoder.new_cache(1, 48)
    logits = [decoder.prefill(cache, [tokens[:prompt]]).logits]
    return torch.cat(logits + [decoder.step(cache, [[t]]).logits for t in tokens[prompt:]])


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "low_rank"),
    [
        ("llama", LowRank("factored", 0.8)),
        ("qwen2", LowRank("factored", 0.7)),  # biases; more layers in two factors
        ("llama", LowRank("residual", 1.4)),
        ("llama", LowRank("residual", 1.5, branch_bits=8)),
        ("qwen2", LowRank("residual", 1.8, branch_bits=16)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.kind}-{value.branch_bits}",
)
def test_the_decoder_gives_what_transformers_gives(architecture, low_rank, isa: str) -> None:
    """A rounding that falls the other way moves what follows it in its text; the rest is equal."""
    model = compressed(low_rank, architecture)
    if low_rank.kind == "factored":
        assert any(isinstance(module, FactoredQuantLinear) for module in model.modules())
    decoder, equal = build_decoder(model), []
    for seed in range(4):
        tokens = random_tokens(model, 1, 40, seed)[0].tolist()
        exact = model(torch.tensor([tokens]), use_cache=False).logits[0, 16:]
        logits = decode_all(decoder, 17, tokens)
        assert (logits - exact).norm() / exact.norm() < 0.02
        if seed == 0:
            assert (logits - exact).abs().median() < 1e-4
        equal.append((logits - exact).abs().amax(1) < 1e-4)
    assert torch.cat(equal).float().mean() > 0.5


def test_rows_of_two_factors_depend_on_nothing_else_bitwise(isa: str) -> None:
    decoder = build_decoder(compressed(LowRank("factored", 0.7), recipe="w4a4"))
    single, several = decoder.new_cache(1, 48), decoder.new_cache(1, 48)
    for cache in (single, several):
        decoder.prefill(cache, [TOKENS[:21]])
    one_by_one = torch.cat([decoder.step(single, [[t]]).logits for t in TOKENS[21:]])
    assert torch.equal(decoder.step(several, [TOKENS[21:]]).logits, one_by_one)


def test_every_instruction_set_and_thread_count_gives_the_same_bits() -> None:
    decoder = build_decoder(compressed(LowRank("factored", 0.7)))
    before, results = torch.get_num_threads(), []
    try:
        for name in AVAILABLE_ISAS:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with force_isa(name):
                    results.append(decode_all(decoder, 30))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_factors_with_branches_of_their_own_are_refused() -> None:
    plain = LinearFormat()
    with pytest.raises(SaltireError, match="factors have no branch"):
        FactoredQuantLinear(96, 64, FactoredFormat(32, plain, replace(plain, rank=2)))
