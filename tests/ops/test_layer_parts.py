"""The parts of a decoder layer as ops: schemas, shapes and what the specification refuses.

What they compute is held to the native decoder in tests/nn/test_device_decoder.py, and their
kernels to the specification in tests/cuda_on_cpu.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.nn.kv_cache import KVCache
from saltire.ops import layer_parts
from saltire.reference.layer_parts import read_cache, write_cache

F32, BF16 = torch.float32, torch.bfloat16
ROWS = torch.tensor([[1, 0, 3, 3, 4, 0], [0, 1, 2, -1, 2, 0]])
D, HEADS, KV_HEADS, HEAD_DIM = 40, 4, 2, 16


def cases() -> dict[str, tuple[object, ...]]:
    state, gain = torch.randn(2, D), torch.rand(D)
    cache = KVCache(1, KV_HEADS, HEAD_DIM, 2, 16, torch.uint8)
    qkv = torch.randn(2, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    rotation = torch.randn(8, 2, HEAD_DIM // 2)
    norm = torch.rand(HEAD_DIM)
    queries, own = torch.randn(2, HEADS, HEAD_DIM), torch.randn(2, 2, KV_HEADS, HEAD_DIM)
    how = (8, None, 8, 1.0, 8)
    return {
        "embed_rows": (ROWS, torch.randn(3, D), torch.zeros(2, D)),
        "residual_norm": (state, state.to(BF16), gain, 1e-5, BF16, torch.zeros(2, D)),
        "residual_norm_quantize": (state, None, gain, 1e-5, None, *how),
        "swiglu": (torch.randn(2, 2 * D),),
        "swiglu_quantize": (torch.randn(2, 2 * D), *how),
        "append_heads": (
            qkv, ROWS, rotation, norm, norm, 1e-5, HEADS, cache.kv, cache.scales, 0,
        ),
        "attend_heads": (
            queries, own, ROWS, cache.kv, cache.scales, 0, 3, False, BF16, None,
        ),
        "best_logits": (torch.randn(2, 9), torch.zeros(2, 9), None),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.saltire, name).default
    torch.library.opcheck(op, cases()[name], test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [F32, BF16, torch.uint8, torch.uint4, torch.uint2], ids=str)
def test_what_is_written_to_a_slot_is_read_there(dtype: torch.dtype) -> None:
    cache = KVCache(2, KV_HEADS, 48, 2, 32, dtype)
    key, value = torch.randn(2, KV_HEADS, 48)
    write_cache(cache.kv, cache.scales, 1, [0, 1, 19, 19], key, value)
    for got, want in zip(read_cache(cache.kv, cache.scales, 1, 1, 48), (key, value), strict=True):
        bits = {torch.uint8: 8, torch.uint4: 4, torch.uint2: 2}.get(dtype)
        bound = 0.02 if bits is None else 1.6 * 5 / 2**bits  # of a range of about 5
        assert (got[:, 19] - want).abs().max() < bound
        rest = torch.cat([got[:, :19], got[:, 20:]], dim=1)
        assert not rest.any(), "another slot changed"


def test_a_sum_of_two_dtypes_is_refused() -> None:
    state = torch.zeros(1, D)
    delta: Tensor = torch.zeros(1, D, dtype=BF16)
    with pytest.raises(SaltireError, match=r"delta is torch\.bfloat16; expected torch\.float32"):
        layer_parts.residual_norm(state, delta, torch.ones(D), 1e-5, F32)
