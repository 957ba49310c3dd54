"""The decoder on a device, graphs and all, against the native one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saltire.decode import ModelDraft, Session, SkipPlanner
from saltire.models.decoder import build_decoder, build_device_decoder
from saltire.nn.decoder import Decoder, DecoderSizes, LayerWeights
from saltire.nn.device_decoder import DeviceDecoder
from saltire.nn.linear_format import LinearFormat
from saltire.nn.native_decoder import NativeDecoder
from saltire.nn.quant_linear import QuantLinear

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

F32, BF16 = torch.float32, torch.bfloat16
SIZES = DecoderSizes(192, 320, 6, 2, 32, 1031, 512)
TOKENS = torch.randint(0, 1031, (120,), generator=torch.Generator().manual_seed(3)).tolist()
FORMATS = {
    "dense": None,
    "w4a4": LinearFormat(4, 4, 0, diag=True, hadamard=64),
    "w4a8 g32": LinearFormat(4, 8, 32, zero_points=True, scale_dtype="float16"),
    "w2a8 g64": LinearFormat(2, 8, 64, hadamard=32),
}


def linear(K: int, N: int, format: LinearFormat | None) -> nn.Module:
    if format is None:
        return nn.Linear(K, N, bias=N == 192)
    module = QuantLinear(K, N, format, bias=N == 192)
    codes = module.weight_packed
    codes.copy_(torch.randint(0, 256, codes.shape, dtype=torch.uint8))
    module.weight_scale.uniform_(0.5, 1.0).mul_(0.2 / K**0.5)
    if module.weight_zero is not None:
        module.weight_zero.fill_(7.0)
    if module.diag is not None:
        module.diag.copy_(torch.linspace(0.5, 1.5, K))  # of q, k and v alike
    return module


def decoder(
    kind: type[Decoder], format: str, dtype: torch.dtype = F32, cache: torch.dtype = F32
) -> Decoder:
    """The same random model on the CPU or, in parts, on the device."""
    torch.manual_seed(0)
    s, how = SIZES, FORMATS[format]
    D, q, kv = s.hidden, s.heads * s.head_dim, s.kv_heads * s.head_dim
    shapes = {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D), "gate": (D, s.ffn),
              "up": (D, s.ffn), "down": (s.ffn, D)}  # fmt: skip
    layers = []
    for index in range(4):
        norms = [torch.rand(n) + 0.5 for n in (D, D, s.head_dim, s.head_dim)]
        linears = {name: linear(*shape, how) for name, shape in shapes.items()}
        layers.append(LayerWeights(*norms, linears, window=40 if index == 1 else 0))
    embedding, head = torch.randn(s.vocabulary, D), nn.Linear(D, s.vocabulary, bias=False)
    final = torch.rand(D) + 0.5

    def rotation(positions):
        angles = positions[:, None].float() * 0.8 ** torch.arange(16, device=positions.device)
        return angles.cos(), angles.sin()

    if kind is NativeDecoder:
        return NativeDecoder(s, 1e-5, embedding, head, final, layers, rotation, cache)
    for layer in layers:
        for module in layer.linears.values():
            module.cuda()
    return DeviceDecoder(
        s, 1e-5, embedding.cuda(), head.cuda(), final, layers, rotation, cache, dtype
    )


def conversation(d: Decoder) -> torch.Tensor:
    cache = d.new_cache(2, 300)
    logits = [d.prefill(cache, [TOKENS[:91], TOKENS[5:8]]).logits]
    logits += [d.step(cache, [[token], [token - 1]]).logits for token in (90, 7, 90, 311)]
    logits.append(d.step(cache, [TOKENS[95:103], []]).logits)
    cache.roll_back(0, 97)
    logits.append(d.step(cache, [TOKENS[20:22], TOKENS[30:33]]).logits)
    logits.append(d.step(cache, [TOKENS[:70], TOKENS[:9]]).logits)  # too long for a graph
    return torch.cat(logits).cpu()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("cache", [F32, torch.uint8], ids=str)
def test_the_native_decoders_logits(format, cache) -> None:
    want = conversation(decoder(NativeDecoder, format, cache=cache))
    got = conversation(decoder(DeviceDecoder, format, cache=cache))
    error = (got - want).norm(dim=-1) / want.norm(dim=-1)
    # A rounding that falls the other way, of a token or a head before, moves a row by some percent.
    assert error.max() < (1e-4 if format == "dense" and cache == F32 else 0.15)


def test_bfloat16_costs_what_it_should() -> None:
    want = conversation(decoder(NativeDecoder, "dense"))
    got = conversation(decoder(DeviceDecoder, "dense", BF16, BF16))
    assert (got - want).norm() / want.norm() < 0.02


@pytest.mark.parametrize("format", FORMATS)
def test_a_padded_step_gives_a_row_the_same_bits(format) -> None:
    d = decoder(DeviceDecoder, format, BF16, BF16)
    d.verify_rows(9)
    cache = d.new_cache(1, 200)
    d.prefill(cache, [TOKENS[:50]])
    one_by_one = torch.cat([d.step(cache, [[token]]).logits for token in TOKENS[50:59]])
    for count in (2, 9):
        cache.roll_back(0, 50)
        got = d.step(cache, [TOKENS[50 : 50 + count]]).logits
        assert torch.equal(got, one_by_one[:count])


def test_results_are_the_same_every_time() -> None:
    first = conversation(decoder(DeviceDecoder, "w4a8 g32", BF16, torch.uint4))
    assert torch.equal(conversation(decoder(DeviceDecoder, "w4a8 g32", BF16, torch.uint4)), first)


def test_skipped_layers_and_hidden_states() -> None:
    units = torch.tensor([3, 0, 2, 1], dtype=torch.uint8)
    results = []
    for kind in (NativeDecoder, DeviceDecoder):
        d = decoder(kind, "dense")
        cache = d.new_cache(1, 64)
        d.prefill(cache, [TOKENS[:20]])
        logits = [d.step(cache, [[7]], units, commit=False).logits for _ in range(2)]
        hidden = torch.linspace(-1, 1, 3 * 192).view(3, 192).to(d.device)
        d.step_rows(cache, d.private_rows(0, 20, 3), [], units, hidden=hidden)
        results.append(torch.cat([*(t.flatten() for t in logits), hidden.flatten()]).cpu())
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_clasp_is_lossless() -> None:
    d = decoder(DeviceDecoder, "w4a8 g32", BF16, BF16)
    d.verify_rows(9)
    prompt = TOKENS[:30]
    plain = Session(d).generate([prompt], 60).tokens
    planner = SkipPlanner(d, 1)
    draft = ModelDraft(d, d.all_units)
    session = Session(d, {"clasp": draft}, planner, {"clasp": 1}, interval=8, fixed=4)
    out = session.generate([prompt], 60)
    assert out.tokens == plain
    assert out.stats.plans > 1


def test_a_transformers_model_on_the_device() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = TOKENS[:20]
    tokens = [token % 512 for token in tokens]
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0, -1]
    model.cuda()
    assert isinstance(build_decoder(model), DeviceDecoder)
    d = build_device_decoder(model, cache_dtype=F32, dtype=F32)
    got = d.prefill(d.new_cache(1, 32), [tokens]).logits[0].cpu()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
