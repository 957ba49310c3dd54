"""nn.Decoder against transformers and the reference, and the properties that speculation needs."""

from __future__ import annotations

import gc

import pytest
import torch

from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder
from saltire.nn.decoder import Decoder
from saltire.ops import force_isa
from saltire.ops.decoder_layer import ATTENTION, MLP, decoder_step
from saltire.reference.decoder_layer import ReferenceCache, ReferenceLayer
from saltire.reference.decoder_layer import decoder_step as reference_step
from tests.conftest import AVAILABLE_ISAS
from tests.tiny import ARCHITECTURES, random_tokens, tiny_model, tiny_tokenizer

TOKENS = random_tokens(tiny_model("llama"), 1, 40)[0].tolist()


@torch.no_grad()
def target_logits(model, tokens):
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def decode_all(decoder: Decoder, tokens, prompt: int, dtype=torch.float32) -> torch.Tensor:
    """Logits of tokens[prompt - 1:], the prompt by prefill, the rest one by one."""
    cache = decoder.new_cache(1, len(tokens), dtype)
    logits = [decoder.prefill(cache, [tokens[:prompt]]).logits]
    logits += [decoder.step(cache, [[token]]).logits for token in tokens[prompt:]]
    return torch.cat(logits)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_transformers_logits(architecture: str, isa: str) -> None:
    model = tiny_model(architecture)
    decoder = build_decoder(model)
    logits = decode_all(decoder, TOKENS, prompt=17)
    torch.testing.assert_close(logits, target_logits(model, TOKENS)[16:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_size": 80, "intermediate_size": 104, "vocab_size": 1031},  # no whole panel, vector
        {"num_key_value_heads": 1, "head_dim": 48},  # a group of four heads, three vectors a head
        {"num_key_value_heads": 4, "head_dim": 80, "num_hidden_layers": 1},  # no groups
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
    ids=["odd-sizes", "multi-query", "wide-heads", "llama3-rope"],
)
def test_unusual_sizes_give_transformers_logits(overrides: dict[str, object], isa: str) -> None:
    model = tiny_model("llama", **overrides)
    logits = decode_all(build_decoder(model), TOKENS, prompt=17)
    torch.testing.assert_close(logits, target_logits(model, TOKENS)[16:], atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_used_as_they_are(dtype: torch.dtype, isa: str) -> None:
    """Only the weights are rounded: the same weights in f32 give the same logits."""
    model = tiny_model("qwen2").to(dtype)
    logits = decode_all(build_decoder(model), TOKENS, prompt=17)
    exact = target_logits(model.float(), TOKENS)[16:]
    torch.testing.assert_close(logits, exact, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 0.02), (torch.uint8, 0.02), (torch.uint4, 0.3)]
)
def test_a_narrow_cache_costs_little(dtype: torch.dtype, bound: float, isa: str) -> None:
    model = tiny_model("qwen3")
    decoder = build_decoder(model)
    exact = target_logits(model, TOKENS)[16:]
    error = decode_all(decoder, TOKENS, 17, dtype) - exact
    assert 1e-5 < error.norm() / exact.norm() < bound


@pytest.mark.parametrize("architecture", ["mistral", "qwen2"])
def test_a_sliding_window_hides_what_is_far(architecture: str, isa: str) -> None:
    overrides = {"sliding_window": 9}
    if architecture == "qwen2":
        overrides |= {"use_sliding_window": True, "max_window_layers": 1}
    model = tiny_model(architecture, **overrides)
    logits = decode_all(build_decoder(model), TOKENS, prompt=17)
    exact = target_logits(model, TOKENS)[16:]
    torch.testing.assert_close(logits, exact, atol=2e-5, rtol=2e-5)
    unlimited = decode_all(build_decoder(tiny_model(architecture)), TOKENS, 17)
    assert (unlimited - exact).abs().max() > 0.01


def test_a_prompt_longer_than_a_pass_is_one_prompt() -> None:
    model = tiny_model("llama", max_position_embeddings=640)
    tokens = random_tokens(model, 1, 600)[0].tolist()
    decoder = build_decoder(model)
    logits = decoder.prefill(decoder.new_cache(1, 600), [tokens]).logits
    torch.testing.assert_close(logits[0], target_logits(model, tokens)[-1], atol=5e-5, rtol=5e-5)


def test_rows_equal_the_reference(isa: str) -> None:
    """Trees, private rows and skipped units, in float64 by the reference."""
    model = tiny_model("qwen3", num_hidden_layers=3)
    decoder = build_decoder(model)
    cache = decoder.new_cache(2, 32)
    chain = decoder.chain_rows
    trunk = [*chain(0, 0, TOKENS[:20]), *chain(1, 0, TOKENS[20:23])]
    branches = [
        [TOKENS[3], 0, 20, 20, 20, 0b1],
        [TOKENS[4], 0, 20, 21, 20, 0b10],  # a sibling: does not see slot 20
        [TOKENS[5], 0, 21, 22, 20, 0b101],  # a child of the first
        [TOKENS[6], 0, 21, 23, 20, 0b1010],  # a child of the second
        [TOKENS[7], 1, 3, -1, 3, 0],
        [TOKENS[8], 1, 3, -1, 3, 0],
    ]
    units = [ATTENTION | MLP, ATTENTION, MLP]
    layers = [
        ReferenceLayer(
            block.input_layernorm.weight.double(),
            block.post_attention_layernorm.weight.double(),
            block.self_attn.q_norm.weight.double(),
            block.self_attn.k_norm.weight.double(),
            [
                (getattr(parent, f"{name}_proj").weight.double(), None)
                for parent, names in (
                    (block.self_attn, "qkvo"),
                    (block.mlp, ("gate", "up", "down")),
                )
                for name in names
            ],
        )
        for block in model.model.layers
    ]
    rotation = decoder._rotation_for(32).double()
    reference_cache = ReferenceCache()
    for rows in (trunk, branches):
        hidden = model.model.embed_tokens.weight[[row[0] for row in rows]].detach().clone()
        expected = reference_step(
            layers, reference_cache, hidden.double(), rows, units, rotation, 16, 1e-6
        )
        decoder.step_rows(cache, rows, [], torch.tensor(units, dtype=torch.uint8), hidden=hidden)
        torch.testing.assert_close(hidden.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_step_of_several_tokens_equals_single_steps_bitwise(isa: str) -> None:
    """What makes greedy speculation lossless: verification gives decoding's very bits."""
    decoder = build_decoder(tiny_model("llama"))
    single, several = decoder.new_cache(1, 64), decoder.new_cache(1, 64)
    for cache in (single, several):
        decoder.prefill(cache, [TOKENS[:21]])
    one_by_one = torch.cat([decoder.step(single, [[t]]).logits for t in TOKENS[21:]])
    for count in (19, 2, 5):
        several.roll_back(0, 21)
        result = decoder.step(several, [TOKENS[21 : 21 + count]])
        assert torch.equal(result.logits, one_by_one[:count])
        assert torch.equal(result.best, one_by_one[:count].argmax(-1))
        share = one_by_one[:count].softmax(-1).amax(-1)
        torch.testing.assert_close(result.share, share, atol=1e-6, rtol=1e-5)


def test_neighbours_in_a_batch_change_no_bit(isa: str) -> None:
    decoder = build_decoder(tiny_model("mistral"))
    prompts = [TOKENS[:5], TOKENS[3:30], TOKENS[7:8]]
    together = decoder.new_cache(3, 64)
    first = decoder.prefill(together, prompts)
    second = decoder.step(together, [TOKENS[:1], TOKENS[4:8], TOKENS[2:4]])
    at = 0
    for b, prompt in enumerate(prompts):
        alone = decoder.new_cache(1, 48)
        assert torch.equal(decoder.prefill(alone, [prompt]).logits[0], first.logits[b])
        tokens = [TOKENS[:1], TOKENS[4:8], TOKENS[2:4]][b]
        expected = decoder.step(alone, [tokens]).logits
        assert torch.equal(expected, second.logits[at : at + len(tokens)])
        at += len(tokens)
    assert together.lengths == [6, 31, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_give_the_bits_of_one(dtype: torch.dtype, isa: str) -> None:
    """Inputs of more than one pass, tiles of 3 and 4 rows, outputs that are no whole panel."""
    overrides = {"intermediate_size": 1344, "vocab_size": 139, "num_hidden_layers": 1}
    decoder = build_decoder(tiny_model("qwen2", **overrides).to(dtype))
    one, many = decoder.new_cache(1, 64), decoder.new_cache(23, 64)
    expected = [decoder.prefill(one, [TOKENS[:9]]).logits, decoder.step(one, [[7]]).logits]
    for count in (12, 13, 23):
        for b in range(23):
            many.roll_back(b, 0)
        some = [TOKENS[:9] if b < count else [] for b in range(23)]
        for found, logits in zip(
            (
                decoder.prefill(many, some).logits,
                decoder.step(many, [prompt and [7] for prompt in some]).logits,
            ),
            expected,
            strict=True,
        ):
            assert torch.equal(found, logits.expand(count, -1))


def test_threads_change_no_bit() -> None:
    decoder = build_decoder(tiny_model("llama", vocab_size=2000, hidden_size=128))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(decode_all(decoder, TOKENS, 30))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_gives_the_same_bits(dtype: torch.dtype) -> None:
    model = tiny_model("qwen3", intermediate_size=104, vocab_size=1031).to(dtype)
    decoder = build_decoder(model)
    results = []
    for name in AVAILABLE_ISAS:
        with force_isa(name):
            dtypes = (dtype, torch.uint8, torch.uint4, torch.uint2)
            results.append([decode_all(decoder, TOKENS, 30, d) for d in dtypes])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_a_rolled_back_draft_leaves_no_trace() -> None:
    decoder = build_decoder(tiny_model("llama"))
    clean, used = decoder.new_cache(1, 64), decoder.new_cache(1, 64)
    for cache in (clean, used):
        decoder.prefill(cache, [TOKENS[:10]])
    skipping = torch.tensor([0, ATTENTION | MLP], dtype=torch.uint8)
    decoder.step(used, [TOKENS[20:30]], units=skipping)
    used.roll_back(0, 10)
    assert torch.equal(
        decoder.step(clean, [TOKENS[10:13]]).logits, decoder.step(used, [TOKENS[10:13]]).logits
    )
    assert clean.lengths == used.lengths == [13]


def test_a_skipped_layer_is_a_layer_that_is_not_there() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    decoder = build_decoder(model)
    units = decoder.all_units.clone()
    units[2] = 0
    logits = decoder.step(decoder.new_cache(1, 40), [TOKENS], units=units).logits
    del model.model.layers[2]
    torch.testing.assert_close(logits, target_logits(model, TOKENS), atol=2e-5, rtol=2e-5)


def test_the_trace_holds_the_states_between_units() -> None:
    model = tiny_model("llama")
    decoder = build_decoder(model)
    trace = torch.empty(5, 1, 64)
    decoder.prefill(decoder.new_cache(1, 40), [TOKENS], trace=trace)
    with torch.no_grad():
        states = model.model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
        torch.testing.assert_close(trace[0, 0], states[0][0, -1])
        torch.testing.assert_close(trace[2, 0], states[1][0, -1], atol=1e-5, rtol=1e-5)
        # transformers' last state is behind the final norm; the trace's is before it.
        torch.testing.assert_close(
            model.model.norm(trace[4, 0]), states[2][0, -1], atol=1e-5, rtol=1e-5
        )


def test_weights_are_shared_with_the_model() -> None:
    model = tiny_model("llama")
    decoder = build_decoder(model)
    before = decode_all(decoder, TOKENS, 17)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)  # tied: the embedding too
    after = decode_all(decoder, TOKENS, 17)
    torch.testing.assert_close(after, target_logits(model, TOKENS)[16:], atol=1e-4, rtol=1e-4)
    assert not torch.equal(before, after)
    parameters = sum(p.numel() * 4 for p in model.parameters())
    assert decoder.weight_bytes == parameters


def test_a_dropped_decoder_is_closed() -> None:
    decoder = build_decoder(tiny_model("llama"))
    handle, cache = decoder._handle, decoder.new_cache(1, 16)
    rotation, units = decoder._rotation_for(16), decoder.all_units
    del decoder
    gc.collect()
    rows, none = torch.zeros(0, 6, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    logits = torch.empty(0, 128)
    with pytest.raises(SaltireError, match="names no open decoder"):
        decoder_step(handle, cache.kv, None, rotation, rows, units, none, logits, prefill=False)


def test_the_step_keeps_its_schemas_promises() -> None:
    decoder = build_decoder(tiny_model("llama"))
    cache = decoder.new_cache(1, 16)
    rows = torch.tensor(decoder.chain_rows(0, 0, TOKENS[:3]))
    arguments = (
        decoder._handle,
        cache.kv,
        None,
        decoder._rotation_for(16),
        rows,
        decoder.all_units,
        torch.tensor([1, 2]),
        torch.empty(2, 128),
        None,
        None,
    )
    torch.library.opcheck(
        torch.ops.saltire.decoder_step.default,
        arguments,
        {"prefill": False},
        test_utils=("test_schema", "test_faketensor"),
    )


def test_refusals_say_what_to_do() -> None:
    decoder = build_decoder(tiny_model("llama"))
    cache = decoder.new_cache(1, 16)
    with pytest.raises(SaltireError, match="has 0 tokens and 17 more are coming; the cache holds"):
        decoder.prefill(cache, [TOKENS[:17]])
    with pytest.raises(SaltireError, match="300 slots; the model has 256 positions"):
        decoder.new_cache(1, 300)
    with pytest.raises(SaltireError, match="2 lists of tokens; the cache has 1"):
        decoder.step(cache, [[3], [4]])
    with pytest.raises(SaltireError, match="token 128; the vocabulary has 128"):
        decoder.step(cache, [[128]])
    with pytest.raises(SaltireError, match="every prompt is empty"):
        decoder.prefill(cache, [[]])
    foreign = build_decoder(tiny_model("llama", num_hidden_layers=3)).new_cache(1, 16)
    with pytest.raises(SaltireError, match="belongs to another model"):
        decoder.step(foreign, [[3]])
    with pytest.raises(SaltireError, match="cannot be rolled back to 4"):
        cache.roll_back(0, 4)
    with pytest.raises(SaltireError, match=r"cache of torch\.float16"):
        decoder.new_cache(1, 16, torch.float16)
    with pytest.raises(SaltireError, match="multiples of 16"):
        build_decoder(tiny_model("llama", head_dim=24))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(SaltireError, match="rope_type = 'dynamic'"):
        build_decoder(tiny_model("llama", rope_parameters=dynamic))


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a4", "w2a4-g64"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_quantised_layers_run_as_transformers_runs_them(
    architecture: str, recipe: str, isa: str
) -> None:
    """A rounding that falls the other way moves a few logits; the rest are equal."""
    model = quantised(architecture, recipe)
    decoder = build_decoder(model)
    logits = decode_all(decoder, TOKENS, prompt=17)
    exact = target_logits(model, TOKENS)[16:]
    assert (logits - exact).norm() / exact.norm() < 0.02
    assert (logits - exact).abs().median() < 1e-4
    assert decoder.weight_bytes < sum(p.numel() * 4 for p in tiny_model(architecture).parameters())


def quantised(architecture: str, recipe: str):
    from saltire.quant import quantize

    model = tiny_model(architecture, hidden_size=64, intermediate_size=128)
    calibration = random_tokens(model, 4, 64, seed=1)
    return quantize(model, tiny_tokenizer(), recipe, calibration)


def test_quantised_rows_depend_on_nothing_else_bitwise(isa: str) -> None:
    decoder = build_decoder(quantised("llama", "w4a4"))
    single, several = decoder.new_cache(1, 64), decoder.new_cache(1, 64)
    for cache in (single, several):
        decoder.prefill(cache, [TOKENS[:21]])
    one_by_one = torch.cat([decoder.step(single, [[t]]).logits for t in TOKENS[21:]])
    assert torch.equal(decoder.step(several, [TOKENS[21:]]).logits, one_by_one)
    prefilled = decoder.new_cache(1, 64)
    decoder.prefill(prefilled, [TOKENS[:21]])
    alone = decoder.new_cache(2, 64)
    both = decoder.prefill(alone, [TOKENS[:21], TOKENS[3:9]]).logits
    again = decoder.new_cache(1, 64)
    assert torch.equal(both[0], decoder.prefill(again, [TOKENS[:21]]).logits[0])


def test_low_rank_branches_and_biases_are_added(isa: str) -> None:
    from saltire.nn.linear_format import LinearFormat
    from saltire.nn.quant_linear import QuantLinear

    model = quantised("qwen2", "w4a8")
    generator = torch.Generator().manual_seed(5)
    for block in model.model.layers:
        for parent, name in ((block.self_attn, "k_proj"), (block.mlp, "down_proj")):
            old = getattr(parent, name)
            format = LinearFormat.from_dict({**old.format.to_dict(), "rank": 3})
            new = QuantLinear(old.in_features, old.out_features, format, old.bias is not None)
            state = dict(old.state_dict())
            state["low_rank_in"] = torch.randn(old.in_features, 3, generator=generator) * 0.2
            state["low_rank_out"] = torch.randn(3, old.out_features, generator=generator) * 0.2
            new.load_state_dict(state)
            setattr(parent, name, new)
    logits = decode_all(build_decoder(model), TOKENS, prompt=17)
    exact = target_logits(model, TOKENS)[16:]
    assert (logits - exact).norm() / exact.norm() < 0.02
    plain = target_logits(quantised("qwen2", "w4a8"), TOKENS)[16:]
    assert (exact - plain).norm() / exact.norm() > 0.05
