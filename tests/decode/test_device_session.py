"""Generation on a decoder in parts: what the native decoder generates. On the CPU, where the parts
are their specification; tests/cuda does the same on a device."""

from __future__ import annotations

import pytest
import torch

from saltire.decode import ModelDraft, NgramDraft, Sampling, Session, SkipPlanner, open_session
from saltire.models.decoder import build_device_decoder
from saltire.nn.device_decoder import DeviceDecoder
from tests.tiny import random_tokens, tiny_model

MODEL = {"num_hidden_layers": 4}
PROMPTS = [row.tolist() for row in random_tokens(tiny_model("llama"), 2, 9)]


def in_parts() -> DeviceDecoder:
    f32 = torch.float32
    return build_device_decoder(tiny_model("llama", **MODEL), cache_dtype=f32, dtype=f32)


@pytest.mark.parametrize("halves", [False, True])
def test_clasp_is_lossless(halves: bool) -> None:
    want = open_session(tiny_model("llama", **MODEL)).generate(PROMPTS, 20).tokens
    decoder = in_parts()
    planner = SkipPlanner(decoder, 2, halves)
    draft = ModelDraft(decoder, decoder.all_units)
    session = Session(decoder, {"clasp": draft}, planner, {"clasp": 2}, interval=4, fixed=3)
    out = session.generate(PROMPTS, 20)
    assert out.tokens == want
    assert out.stats.plans > 2
    assert sum(out.stats.accepted.values()) > 0


def test_plans_are_the_native_decoders() -> None:
    plans = []
    for decoder in (open_session(tiny_model("llama", **MODEL)).decoder, in_parts()):
        cache = decoder.new_cache(1, 32)
        planner = SkipPlanner(decoder, 3, halves=True)
        trace = planner.trace(1)
        decoder.prefill(cache, [PROMPTS[0]], trace=trace)
        plans.append(planner.plans(cache, 0, 8, trace[:, 0]))
    for one, other in zip(*plans, strict=True):
        assert torch.equal(one.units, other.units)
        assert one.cosine == pytest.approx(other.cosine, abs=1e-5)


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_sampled_generation_draws_the_same_tokens(penalty: float) -> None:
    sampling = Sampling(temperature=0.8, top_p=0.9, seed=5, repetition_penalty=penalty)
    want = open_session(tiny_model("llama", **MODEL)).generate(PROMPTS, 20, sampling)
    assert Session(in_parts()).generate(PROMPTS, 20, sampling).tokens == want.tokens


def test_ngrams_verify_in_steps_of_one_size() -> None:
    decoder = in_parts()
    session = Session(decoder, {"ngram": NgramDraft()}, fixed=3)
    prompt = PROMPTS[0] + PROMPTS[0]
    want = open_session(tiny_model("llama", **MODEL)).generate([prompt], 40).tokens
    assert session.generate([prompt], 40).tokens == want
    assert decoder.memory.recorded_rows == [[16]]


@pytest.mark.parametrize("budget", [1, 8, 21])
def test_plain_generation_runs_ahead(budget: int) -> None:
    """Eight steps at a time, up to the budget or the first stop token; callbacks see each token."""
    native = open_session(tiny_model("llama", **MODEL))
    free = native.generate(PROMPTS, budget).tokens
    session = Session(in_parts())
    assert session.generate(PROMPTS, budget).tokens == free
    stop = [free[0][budget // 2]]
    seen: list[list[int]] = [[], []]
    got = session.generate(PROMPTS, budget, stop=stop, on_tokens=lambda b, t: seen[b].extend(t))
    assert got.tokens == native.generate(PROMPTS, budget, stop=stop).tokens
    assert seen == got.tokens
