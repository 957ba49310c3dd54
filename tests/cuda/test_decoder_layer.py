"""decoder_layer's parts on a device against the specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saltire import ops
from saltire.nn.kv_cache import KVCache
from saltire.ops import layer_parts
from saltire.reference import layer_parts as reference

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [F32, BF16, torch.uint8, torch.uint4, torch.uint2]
BOUNDS = {F32: 2e-6, BF16: 2**-7}
CUDA = torch.device("cuda")
EPS = 1e-5


def close(got: Tensor, want: Tensor, bound: float) -> None:
    assert (got.cpu().double() - want.double()).norm() / want.double().norm() < bound


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("M", [1, 16, 300])
@pytest.mark.parametrize("K", [576, 4096, 16384])
def test_norms(M, K, dtype) -> None:
    state, delta, gain = torch.randn(M, K), torch.randn(M, K).to(dtype), torch.rand(K) + 0.5
    on_device, trace = state.cuda(), torch.empty(M, K, device=CUDA)
    y = layer_parts.residual_norm(on_device, delta.cuda(), gain.cuda(), EPS, dtype, trace)
    total, want = reference.residual_norm(state, delta, gain.double(), EPS)
    assert torch.equal(on_device.cpu(), total)
    assert torch.equal(trace, on_device)
    close(y, want, BOUNDS[dtype])


@pytest.mark.parametrize("K", [768, 4096, 14336])
def test_codes_of_norms_and_gates(K) -> None:
    """Of values of ±1 the norm is exactly 1: codes are transform_quantize's, to the bit."""
    how = {"bits": 4, "hadamard": 128, "clip": 0.95, "sum_group": 128}
    gain, diag = torch.randn(K), torch.rand(K) + 0.5
    state = torch.randint(0, 2, (5, K)).float() * 2 - 1
    got = layer_parts.residual_norm_quantize(
        state.cuda(), None, gain.cuda(), 0.0, None, 4, diag.cuda(), 128, 0.95, 128
    )
    for one, other in zip(got, ops.transform_quantize(state * gain, diag=diag, **how), strict=True):
        assert torch.equal(one.cpu(), other)
    gate_up = torch.randn(5, 2 * K).bfloat16()
    want = reference.swiglu(gate_up.double())
    close(layer_parts.swiglu(gate_up.cuda()), want, 2**-8)
    codes, scale, _ = layer_parts.swiglu_quantize(gate_up.cuda(), 8, diag.cuda(), 128, 1.0, 0)
    wanted = ops.transform_quantize(want.float(), 8, diag=diag, hadamard=128)
    close(scale, wanted[1], 1e-5)
    assert (codes.cpu().int() - wanted[0].int()).abs().max() <= 1


def rows_for(sequences: int, longest: int) -> Tensor:
    """A chain, a private row and a tree in each sequence, all at places of their own."""
    rows = []
    for b in range(sequences):
        end = longest - 70 - 13 * b
        rows += [[0, b, end + i, end + i, end + i + 1, 0] for i in range(3)]
        rows.append([0, b, end, -1, end, 0])
        rows.append([0, b, end + 1, end + 40, end, (1 << 40) | 1])
    return torch.tensor(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "slots", "window"),
    [(9, 3, 64, 700, 0), (32, 8, 128, 300, 0), (4, 4, 48, 256, 100), (6, 1, 256, 160, 0)],
)
def test_heads_and_attention(heads, kv_heads, d, slots, window, dtype) -> None:
    host, device = (
        KVCache(1, kv_heads, d, 2, slots, dtype),
        KVCache(1, kv_heads, d, 2, slots, dtype, CUDA),
    )
    rotation = torch.randn(slots, 2, d // 2)
    fill = torch.tensor([[0, b, t, t, t + 1, 0] for b in range(2) for t in range(slots - 70)])
    norms = (torch.rand(d) + 0.5, torch.rand(d) + 0.5)
    for rows in (fill, rows_for(2, slots)):
        qkv = torch.randn(rows.shape[0], (heads + 2 * kv_heads) * d)
        queries, own = reference.append_heads(
            qkv, rows, rotation, *norms, EPS, heads, host.kv, host.scales, 0
        )
        got = layer_parts.append_heads(
            qkv.cuda(), rows.cuda(), rotation.cuda(), *(n.cuda() for n in norms), EPS, heads,
            device.kv, device.scales, 0,
        )  # fmt: skip
        close(got[0], queries, 1e-5)
        close(got[1], own, 1e-5)
    for b in range(2):
        mine = reference.read_cache(device.kv.cpu(), _cpu(device.scales), 0, b, d)
        theirs = reference.read_cache(host.kv, host.scales, 0, b, d)
        for one, other in zip(mine, theirs, strict=True):
            close(one, other, 0.01)
    # Attention over the very same cache.
    device.kv.copy_(host.kv)
    if host.scales is not None and device.scales is not None:
        device.scales.copy_(host.scales)
    want = reference.attend_heads(
        queries.double(), own.double(), rows, host.kv, host.scales, 0, window
    )
    counters = layer_parts.attention_counters(rows.shape[0], heads, kv_heads)
    scratch = torch.zeros(counters, dtype=torch.int32, device=CUDA)

    def attend(some: slice, out: torch.dtype) -> Tensor:
        return layer_parts.attend_heads(
            queries[some].cuda(), own[:, some].contiguous().cuda(), rows[some].cuda(), device.kv,
            device.scales, 0, window, False, out, scratch,
        )  # fmt: skip

    together = attend(slice(None), F32)
    close(together, want, 1e-5)
    close(attend(slice(None), BF16), want, 2**-7)
    assert not scratch.any()
    for m in (0, 3, 4):
        assert torch.equal(attend(slice(m, m + 1), F32)[0], together[m])


def _cpu(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_prompt(dtype) -> None:
    heads, kv_heads, d, T = 9, 3, 64, 333
    cache = KVCache(1, kv_heads, d, 1, T, dtype)
    rows = torch.tensor([[0, 0, t, t, t + 1, 0] for t in range(T)])
    qkv = torch.randn(T, (heads + 2 * kv_heads) * d)
    queries, own = reference.append_heads(
        qkv, rows, torch.randn(T, 2, d // 2), None, None, EPS, heads, cache.kv, cache.scales, 0
    )
    want = reference.attend_heads(
        queries.double(), own.double(), rows, cache.kv, cache.scales, 0, 0
    )
    got = layer_parts.attend_heads(
        queries.cuda(), own.cuda(), rows.cuda(), cache.kv.cuda(),
        None if cache.scales is None else cache.scales.cuda(), 0, 0, True, F32, None,
    )  # fmt: skip
    close(got, want, 1e-5)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("V", [1031, 49152, 128256])
def test_the_largest_logit(V, dtype) -> None:
    y = (torch.randn(4, V, device=CUDA) * 2).to(dtype)
    y[1, [V // 3, V - 1]] = 30.0
    scratch = torch.zeros(4, dtype=torch.int32, device=CUDA)
    logits = torch.empty(4, V, device=CUDA)
    best, share = layer_parts.best_logits(y, logits, scratch)
    assert torch.equal(logits, y.float())
    assert torch.equal(best, logits.cpu().argmax(-1).cuda())
    close(share, y.double().softmax(-1).amax(-1).cpu(), 1e-5)
    assert not scratch.any()
