"""The decoder in parts, on the CPU by their specification: what the native decoder gives.

Kernels are held to the same specification in tests/cuda_on_cpu, and to both in tests/cuda.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder, build_device_decoder
from saltire.models.rounding import round_linear
from saltire.nn.decoder import Decoder
from saltire.nn.device_products import Product
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.linear_format import FactoredFormat, LinearFormat
from saltire.nn.quant_linear import QuantLinear
from saltire.ops.decoder_layer import ATTENTION, MLP
from tests.nn.test_decoder import TOKENS, quantised
from tests.tiny import ARCHITECTURES, tiny_model

F32, BF16 = torch.float32, torch.bfloat16
CPU = torch.device("cpu")


def in_parts(model, cache_dtype: torch.dtype = F32, dtype: torch.dtype = F32):
    return build_device_decoder(model, cache_dtype=cache_dtype, dtype=dtype)


def both(model, cache_dtype: torch.dtype = F32) -> tuple[Decoder, Decoder]:
    native = build_decoder(model)
    native.cache_dtype = cache_dtype
    return native, in_parts(model, cache_dtype)


def conversation(decoder: Decoder) -> torch.Tensor:
    """Prompts of two sequences, then steps of one and of several tokens, with a roll-back."""
    cache = decoder.new_cache(2, 48)
    logits = [decoder.prefill(cache, [TOKENS[:11], TOKENS[5:8]]).logits]
    logits.append(decoder.step(cache, [[TOKENS[11]], [TOKENS[9]]]).logits)
    logits.append(decoder.step(cache, [TOKENS[12:17], []]).logits)
    cache.roll_back(0, 14)
    logits.append(decoder.step(cache, [TOKENS[20:22], TOKENS[30:33]]).logits)
    assert cache.lengths == [16, 7]
    return torch.cat(logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture: str) -> None:
    overrides = {"sliding_window": 6} if architecture == "mistral" else {}
    native, parts = both(tiny_model(architecture, **overrides))
    torch.testing.assert_close(conversation(parts), conversation(native), atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a4", "w2a4-g64"])
def test_quantised_models(recipe: str) -> None:
    """A rounding that falls the other way moves a few logits; the rest are equal."""
    native, parts = both(quantised("qwen2", recipe))
    want, got = conversation(native), conversation(parts)
    assert (got - want).norm() / want.norm() < 0.02
    assert (got - want).abs().median() < 1e-4


@pytest.mark.parametrize(
    ("dtype", "bound"), [(BF16, 2e-3), (torch.uint8, 2e-3), (torch.uint4, 0.02)]
)
def test_caches_of_fewer_bits(dtype: torch.dtype, bound: float) -> None:
    native, parts = both(tiny_model("qwen3"), dtype)
    want, got = conversation(native), conversation(parts)
    assert (got - want).norm() / want.norm() < bound


def test_bfloat16_between_the_parts_costs_little() -> None:
    model = tiny_model("llama")
    want, got = conversation(build_decoder(model)), conversation(in_parts(model, BF16, BF16))
    assert 1e-4 < (got - want).norm() / want.norm() < 0.03


def test_trees_private_rows_and_skipped_units() -> None:
    native, parts = both(tiny_model("qwen3", num_hidden_layers=3))
    chain = native.chain_rows
    trunk = [*chain(0, 0, TOKENS[:20]), *chain(1, 0, TOKENS[20:23])]
    branches = [
        [TOKENS[3], 0, 20, 20, 20, 0b1],
        [TOKENS[4], 0, 20, 21, 20, 0b10],
        [TOKENS[5], 0, 21, 22, 20, 0b101],
        [TOKENS[7], 1, 3, -1, 3, 0],
    ]
    units = torch.tensor([ATTENTION | MLP, ATTENTION, MLP], dtype=torch.uint8)
    results = []
    for decoder in (native, parts):
        cache = decoder.new_cache(2, 32)
        decoder.step_rows(cache, trunk, [])
        logits = decoder.step_rows(cache, branches, [0, 2, 3], units).logits
        hidden = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
        decoder.step_rows(cache, decoder.private_rows(0, 20, 2), [], units, hidden=hidden)
        results.append((logits, hidden))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("skipping", [False, True])
def test_traces_hold_the_states_between_units(skipping: bool) -> None:
    native, parts = both(tiny_model("llama", num_hidden_layers=3))
    units = torch.tensor([3, 0, 2], dtype=torch.uint8) if skipping else None
    traces = []
    for decoder in (native, parts):
        cache, prompt, step = decoder.new_cache(1, 48), torch.empty(7, 1, 64), torch.empty(7, 3, 64)
        decoder.prefill(cache, [TOKENS[:9]], trace=prompt)
        decoder.step(cache, [TOKENS[9:12]], units, trace=step)
        traces.append(torch.cat([prompt, step], dim=1))
    torch.testing.assert_close(*traces, atol=5e-5, rtol=5e-5)


def test_long_steps_and_prompts_of_several_pieces() -> None:
    native, parts = both(tiny_model("llama", max_position_embeddings=256))
    parts.prefill_rows = 50
    results = []
    for decoder in (native, parts):
        cache = decoder.new_cache(1, 240)
        logits = decoder.prefill(cache, [(TOKENS * 4)[:130]]).logits
        results.append(torch.cat([logits, decoder.step(cache, [(TOKENS * 2)[:70]]).logits]))
    torch.testing.assert_close(*results, atol=5e-5, rtol=5e-5)


def test_drafts_are_the_native_decoders() -> None:
    native, parts = both(tiny_model("llama", num_hidden_layers=3))
    units = torch.tensor([3, 0, 3], dtype=torch.uint8)
    survival = torch.linspace(0.6, 1.0, 16)
    for confidence, worth, outputs in ((0.0, 0.0, 0), (0.05, 0.0, 0), (0.0, 0.3, 100)):
        results = []
        for decoder in (native, parts):
            cache = decoder.new_cache(2, 48)
            decoder.prefill(cache, [TOKENS[:9], TOKENS[3:8]])
            starts = [[TOKENS[9], 0, 9, 6], [TOKENS[8], 1, 5, 3]]
            results.append(
                decoder.draft(cache, starts, survival, units, confidence, worth, outputs)
            )
        (tokens, shares), (got, got_shares) = results
        assert got == tokens
        for one, other in zip(got_shares, shares, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=1e-5, rtol=1e-4)


def test_running_ahead_is_step_after_step() -> None:
    native, parts = both(tiny_model("llama"))
    parts.verify_rows(8)  # idle rows stay idle
    results = []
    for decoder in (native, parts):
        cache = decoder.new_cache(2, 48)
        decoder.prefill(cache, [TOKENS[:9], TOKENS[3:8]])
        starts = [[TOKENS[9], 0, 9], [TOKENS[8], 1, 5]]
        results.append(decoder.run_ahead(cache, starts, 6))
        assert cache.lengths == [9, 5]
        first = decoder.step(cache, [[TOKENS[9]], [TOKENS[8]]]).best.tolist()
        assert [tokens[0] for tokens in results[-1]] == first
    assert results[0] == results[1]
    with pytest.raises(SaltireError, match="position 256"):
        parts.run_ahead(parts.new_cache(1, 16), [[3, 0, 250]], 7)


# --- recording -----------------------------------------------------------------------------------


def counting(recorded: list[int]):
    """A recorder that counts, and refuses to record what was recorded before."""

    def record(work: Callable[[], None], changed) -> Callable[[], None]:
        recorded.append(1)
        return work

    return record


def test_a_new_choice_of_layers_records_nothing_anew() -> None:
    decoder = in_parts(tiny_model("llama", num_hidden_layers=4))
    recorded: list[int] = []
    decoder.record = counting(recorded)
    cache = decoder.new_cache(1, 48)
    decoder.prefill(cache, [TOKENS[:9]])
    for plan in ([3, 3, 0, 3], [0, 3, 3, 3]):
        decoder.step(cache, [[5]], torch.tensor(plan, dtype=torch.uint8), commit=False)
    before = len(recorded)
    assert before == 2 + 4  # embedding, head, and each layer once
    for plan in ([3, 0, 3, 0], [0, 0, 0, 3]):
        decoder.step(cache, [[7]], torch.tensor(plan, dtype=torch.uint8))
    assert len(recorded) == before
    for token in TOKENS[10:14]:
        decoder.step(cache, [[token]])
    assert len(recorded) == before + 1  # a whole step, once


def test_a_replay_depends_on_its_rows_alone() -> None:
    """The first recording serves every later step: nothing of the first one sticks."""
    model = tiny_model("llama")
    one, fresh = in_parts(model), in_parts(model)
    cache = one.new_cache(2, 48)
    one.prefill(cache, [TOKENS[:9], TOKENS[4:6]])
    for place, token in enumerate(TOKENS[9:13]):
        got = one.step(cache, [[token], []]).logits
        other = fresh.new_cache(2, 48)
        fresh.prefill(other, [TOKENS[: 9 + place], []])
        fresh.memory._homes.clear()
        want = fresh.step(other, [[token], []]).logits
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_steps_are_padded_so_that_all_take_the_same_kernels() -> None:
    decoder = in_parts(tiny_model("llama"))
    decoder.verify_rows(9)
    cache = decoder.new_cache(1, 48)
    decoder.prefill(cache, [TOKENS[:9]])
    for count in (1, 5, 9):
        decoder.step(cache, [TOKENS[:count]], commit=False)
    assert decoder.memory.recorded_rows == [[16]]


@pytest.mark.parametrize("dtype", [F32, torch.uint4])
def test_a_new_cache_takes_the_place_of_one_that_is_gone(dtype: torch.dtype) -> None:
    decoder = in_parts(tiny_model("llama"), dtype)
    recorded: list[int] = []
    decoder.record = counting(recorded)
    first = decoder.new_cache(1, 48)
    decoder.step(first, [[7]])
    second = decoder.new_cache(1, 48)
    assert second.kv is not first.kv, "two caches in one place"
    want = decoder.step(second, [[5]]).logits
    assert len(recorded) == 2
    place = first.kv
    del first
    again = decoder.new_cache(1, 200)  # rounded up to the same number of slots
    assert again.kv is place
    assert again.lengths == [0]
    assert not place.any()
    assert torch.equal(decoder.step(again, [[5]]).logits, want)
    assert len(recorded) == 2


def test_only_the_graphs_of_a_few_caches_are_kept() -> None:
    decoder = in_parts(tiny_model("llama"))
    caches = [decoder.new_cache(1, 16) for _ in range(7)]
    for cache in caches:
        decoder.step(cache, [[3]])
    assert len(decoder.memory.recorded_rows) == 4


# --- products ------------------------------------------------------------------------------------


def quant(N: int, seed: int, bias: bool = False, **format: object) -> QuantLinear:
    generator = torch.Generator().manual_seed(seed)
    values = {"weight_bits": 4, "act_bits": 8, "hadamard": 16, "diag": True, "group": 32}
    module = QuantLinear(64, N, LinearFormat(**{**values, **format}), bias=bias)
    module.weight_packed.random_(0, 256, generator=generator)
    for name in ("weight_scale", "low_rank_in", "low_rank_out", "bias"):
        buffer = getattr(module, name)
        if buffer is not None:
            buffer.uniform_(0.01, 0.1, generator=generator)
    if module.left is not None:
        module.left.copy_(torch.linalg.qr(torch.randn(4, 4, generator=generator))[0])
    if module.diag is not None:
        module.diag.copy_(torch.linspace(0.5, 1.5, 64))
    return module


def factored(N: int, seed: int) -> FactoredQuantLinear:
    down = LinearFormat(4, 8, 32, hadamard=16)
    module = FactoredQuantLinear(64, N, FactoredFormat(32, down, LinearFormat(4, 8, 32)), bias=True)
    module.down = quant(32, seed, diag=False)
    module.up.weight_packed.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    module.up.weight_scale.fill_(0.01)
    module.up.bias.fill_(0.5)
    return module


GROUPS: dict[str, tuple[list[nn.Module], int, bool]] = {
    # modules, weights they become, whether codes are all that is read
    "one weight": ([quant(40, 1), quant(8, 2, bias=True), quant(8, 3)], 1, True),
    "weights of other widths": ([quant(40, 1), quant(8, 2, weight_bits=2)], 2, True),
    "another rounding": ([quant(40, 1), quant(8, 2, act_bits=4)], 2, False),
    "a branch": ([quant(40, 1), quant(8, 2, rank=4)], 2, False),
    "a large rotation": ([quant(40, 1, left=4)], 1, False),
    "factors": ([factored(40, 1), factored(8, 2)], 2, True),
    "dense": ([nn.Linear(64, 40), nn.Linear(64, 8, bias=False)], 1, False),
    "dense beside codes": ([nn.Linear(64, 40), quant(8, 2)], 2, False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", GROUPS)
def test_a_product_is_its_layers_side_by_side(name: str) -> None:
    modules, weights, codes = GROUPS[name]
    product = Product({f"m{i}": module for i, module in enumerate(modules)}, F32, CPU)
    assert len(product.parts) == weights
    assert (product.codes_of is not None) == codes
    x = torch.randn(5, 64)
    want = torch.cat([module(x) for module in modules], dim=1)
    torch.testing.assert_close(product(x), want, atol=1e-5, rtol=1e-5)
    # The same of what precedes it, whichever way it is handed over.
    state, gain = torch.randn(5, 64), torch.rand(64) + 0.5
    normed = state * torch.rsqrt(state.square().mean(-1, keepdim=True) + 1e-5) * gain
    want = torch.cat([module(normed) for module in modules], dim=1)
    got = product.of_norm(state, None, gain, 1e-5)
    assert (got - want).norm() / want.norm() < 2e-3  # a rounding may fall the other way
    gate_up = torch.randn(5, 128)
    gated = nn.functional.silu(gate_up[:, :64]) * gate_up[:, 64:]
    want = torch.cat([module(gated) for module in modules], dim=1)
    got = product.of_gate(gate_up)
    assert (got - want).norm() / want.norm() < 2e-3


def test_a_quantised_head_reads_what_16_bit_layers_leave() -> None:
    """Its own numbers are float32; of codes, or, with a branch, of numbers."""
    model = tiny_model("mistral")
    want = conversation(in_parts(model, BF16, BF16))
    for branch in (0, 4):
        head = round_linear(model.lm_head, LinearFormat(4, 8, 32, True, "float16"))
        if branch:
            format = LinearFormat.from_dict({**head.format.to_dict(), "rank": branch})
            new = QuantLinear(64, 128, format)
            zeros = {"low_rank_in": torch.zeros(64, 4), "low_rank_out": torch.zeros(4, 128)}
            new.load_state_dict({**head.state_dict(), **zeros})
            head = new

        def linear(name: str, module: nn.Module, head: nn.Module = head) -> nn.Module:
            return head if name == "lm_head" else module

        got = conversation(build_device_decoder(model, linear, BF16, BF16))
        assert 0.005 < (got - want).norm() / want.norm() < 0.2


# --- refusals ------------------------------------------------------------------------------------


def test_refusals_say_what_was_expected() -> None:
    decoder = in_parts(tiny_model("llama"))
    cache = decoder.new_cache(1, 16)
    rows = decoder.chain_rows(0, 0, [3])
    late = [[3, 0, 250, 250, 251, 1 << 40]]
    with pytest.raises(SaltireError, match="prefix 292; expected 0 to 256"):
        decoder.step_rows(cache, late, [0])
    for column, value, message in (
        (0, 128, "token 128; expected 0 to 127"),
        (1, 1, "sequence 1; expected 0 to 0"),
        (2, 256, "position 256"),
        (3, 256, "slot 256; expected -1 to 255"),
        (4, 257, "prefix 257"),
        (4, 300, "prefix 300"),
    ):
        bad = [list(rows[0])]
        bad[0][column] = value
        with pytest.raises(SaltireError, match=message):
            decoder.step_rows(cache, bad, [0])
    with pytest.raises(SaltireError, match="sees no slot"):
        decoder.step_rows(cache, [[3, 0, 0, 0, 0, 0]], [0])
    with pytest.raises(SaltireError, match="wanted 1"):
        decoder.step_rows(cache, rows, [1])
    foreign = in_parts(tiny_model("llama", num_hidden_layers=3)).new_cache(1, 16)
    with pytest.raises(SaltireError, match="belongs to another model"):
        decoder.step(foreign, [[3]])
    model = tiny_model("llama")
    model.model.layers[0].self_attn.o_proj = nn.Identity()
    with pytest.raises(SaltireError, match="o_proj is a Identity; the decoder runs"):
        in_parts(model)
