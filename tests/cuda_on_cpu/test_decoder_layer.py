"""decoder_layer's CUDA kernels on the emulator, against the specification."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saltire import ops
from saltire.nn.kv_cache import KVCache
from saltire.ops.layer_parts import attention_counters
from saltire.reference import layer_parts as reference
from tests.cuda_on_cpu.emulate import EmulatorError, build, run

NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 3, torch.uint4: 4, torch.uint2: 5}
F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-5


@pytest.fixture(scope="module")
def program() -> Path:
    return build("decoder_layer")


# --- tokens --------------------------------------------------------------------------------------


def tokens(program: Path, M: int, K: int, dtype: torch.dtype, codes: dict | None = None, **more):
    out = {}
    if codes is None:
        out["y"] = (dtype, (M, K))
    else:
        group = codes.pop("sum_group", 0) or K
        more |= {"hadamard": 1, "clip": 1.0, **codes, "sum_group": group}
        out = {
            "codes": (torch.int8, (M, K)),
            "scale": (F32, (M,)),
            "sums": (torch.int32, (M, K // group)),
        }
    inout = {"state": more.pop("state").clone()} if "state" in more else {}
    if more.pop("traced", False):
        out["trace"] = (F32, (M, K))
    return run(program, 0, out, inout, what="tokens", M=M, K=K, dtype=NUMBERS[dtype], **more)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    ("K", "plan"),
    [(40, "threads=32 chunks=1"), (576, "threads=96 chunks=1"), (8200, "threads=544 chunks=2")],
)
def test_norm_of_a_residual_sum(program, K, plan, dtype) -> None:
    state, delta, gain = torch.randn(3, K) * 4, torch.randn(3, K).to(dtype), torch.rand(K) + 0.5
    got = tokens(program, 3, K, dtype, state=state, delta=delta, gain=gain, eps=EPS, traced=True)
    assert got["plan"] == plan
    want = reference.residual_norm(state.double(), delta.double(), gain.double(), EPS)[1]
    assert torch.equal(got["state"], state + delta.float())
    assert torch.equal(got["trace"], got["state"])
    bound = 1e-6 if dtype == F32 else 2**-8
    torch.testing.assert_close(got["y"].double(), want, rtol=bound, atol=1e-7)


def test_norm_alone_leaves_the_state(program) -> None:
    state, gain = torch.randn(2, 64), torch.rand(64)
    got = tokens(program, 2, 64, F32, state=state, gain=gain, eps=EPS)
    assert torch.equal(got["state"], state)
    want = reference.residual_norm(state.double(), None, gain.double(), EPS)[1]
    torch.testing.assert_close(got["y"].double(), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "how",
    [
        {"bits": 4, "hadamard": 64, "sum_group": 32},
        {"bits": 8, "hadamard": 256, "clip": 0.9},
        {"bits": 3, "sum_group": 128},
    ],
)
def test_codes_of_a_norm_are_transform_quantizes(program, how) -> None:
    """Values of ±1 have a norm of exactly 1, so what is rounded is the gain, to the bit."""
    K, gain = 768, torch.randn(768)
    state = torch.randint(0, 2, (2, K)).float() * 2 - 1
    diag = torch.rand(K) + 0.5
    got = tokens(program, 2, K, F32, dict(how), state=state, gain=gain, eps=0.0, diag=diag)
    want = ops.transform_quantize(state * gain, diag=diag, **how)
    for name, expected in zip(("codes", "scale", "sums"), want, strict=True):
        assert torch.equal(got[name], expected), name


@pytest.mark.parametrize("K", [72, 1536, 8448])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_gated_values_and_their_codes(program, K, dtype) -> None:
    gate_up = (torch.randn(2, 2 * K) * 3).to(dtype)
    gate_up[0, 0], gate_up[1, 3] = 90.0, -90.0  # e^x is infinite on one side
    want = reference.swiglu(gate_up.double())
    got = tokens(program, 2, K, dtype, gate_up=gate_up)["y"].double()
    torch.testing.assert_close(got, want, rtol=2e-6 if dtype == F32 else 2**-8, atol=1e-7)
    how = {"bits": 8, "hadamard": 8, "sum_group": K // 3}
    got = tokens(program, 2, K, dtype, dict(how), gate_up=gate_up)
    codes, scale, _ = ops.transform_quantize(want.float(), **how)
    torch.testing.assert_close(got["scale"], scale, rtol=1e-6, atol=0)
    away = (got["codes"].int() - codes.int()).abs()
    assert away.max() <= 1
    assert (away > 0).float().mean() < 0.005
    assert torch.equal(got["sums"], got["codes"].view(2, 3, -1).int().sum(-1, dtype=torch.int32))


def test_tokens_that_no_block_takes_are_refused(program) -> None:
    for K in (20, 32776):
        with pytest.raises(EmulatorError, match="expected a multiple of 8 up to 32768"):
            tokens(program, 1, K, F32, gate_up=torch.zeros(1, 2 * K))
    with pytest.raises(EmulatorError, match="up to 16384"):
        tokens(program, 1, 16392, F32, state=torch.zeros(1, 16392), gain=torch.ones(16392))


@pytest.mark.parametrize("dtype", NUMBERS)
def test_rows_of_the_embedding(program, dtype) -> None:
    embedding = torch.randn(7, 200).to(dtype)
    rows = torch.tensor([[6, 0, 0, 0, 1, 0], [2, 0, 1, 1, 2, 0], [6, 1, 0, 0, 1, 0]])
    got = run(
        program, 0, {"state": (F32, (3, 200))}, what="embed", M=3, D=200, rows=rows,
        embedding=embedding, dtype=NUMBERS[dtype],
    )  # fmt: skip
    assert torch.equal(got["state"], embedding[rows[:, 0]].float())


# --- heads ---------------------------------------------------------------------------------------


def cache_numbers(cache: KVCache) -> dict[str, int]:
    _, _, B, G, T, width = cache.kv.shape
    bits = {torch.uint8: 8, torch.uint4: 4, torch.uint2: 2}.get(cache.dtype, 8)
    head_dim = width * 8 // bits
    numbers = {"format": FORMATS[cache.dtype], "B": B, "kv_heads": G, "slots": T}
    return {**numbers, "head_dim": head_dim}


def append(program, cache, heads, qkv, rows, rotation, q_norm=None, k_norm=None):
    """What the kernel leaves: queries, own, and the cache's tensors, of a cache of one layer."""
    numbers = cache_numbers(cache)
    M, G, d = rows.shape[0], numbers["kv_heads"], numbers["head_dim"]
    inout = {"kv": cache.kv}
    if cache.scales is not None:
        inout["scales"] = cache.scales
    return run(
        program, 0, {"queries": (F32, (M, heads, d)), "own": (F32, (2, M, G, d))}, inout,
        what="append", M=M, heads=heads, qkv=qkv, dtype=NUMBERS[qkv.dtype], rows=rows,
        rotation=rotation, q_norm=q_norm, k_norm=k_norm, eps=EPS, **numbers,
    )  # fmt: skip


def rotation_table(positions: int, d: int) -> Tensor:
    angles = torch.arange(positions)[:, None] * 0.7 ** torch.arange(d // 2)
    return torch.stack([angles.cos(), angles.sin()], dim=1).float().contiguous()


ROWS = torch.tensor(
    [
        [0, 1, 17, 17, 18, 0],
        [0, 1, 18, 19, 18, 0b10],  # of a tree: its slot is not its position
        [0, 0, 3, 3, 4, 0],
        [0, 2, 0, 0, 1, 0],
        [0, 2, 5, -1, 5, 0],  # in no slot
    ]
)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(3, 1, 64), (4, 4, 16), (8, 2, 48)])
def test_heads_go_to_their_slots(program, dtype, heads, kv_heads, d) -> None:
    """Every byte of the cache that is no row's stays as it was."""
    cache, want = (KVCache(1, kv_heads, d, 3, 32, dtype) for _ in range(2))
    for c in (cache, want):
        c.kv.copy_(torch.arange(c.kv.numel()).remainder(7).view_as(c.kv))
    qkv = torch.randn(5, (heads + 2 * kv_heads) * d).to(BF16 if d == 64 else F32)
    norms = (torch.rand(d) + 0.5, torch.rand(d) + 0.5) if heads == 8 else (None, None)
    rotation = rotation_table(20, d)
    got = append(program, cache, heads, qkv, ROWS, rotation, *norms)
    queries, own = reference.append_heads(
        qkv, ROWS, rotation, *norms, EPS, heads, want.kv, want.scales, 0
    )
    torch.testing.assert_close(got["queries"], queries, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["own"], own, rtol=1e-5, atol=1e-5)
    bound = {F32: 1e-5, BF16: 2**-6}.get(dtype)
    for b in range(3):
        mine = reference.read_cache(got["kv"], got.get("scales"), 0, b, d)
        theirs = reference.read_cache(want.kv, want.scales, 0, b, d)
        for one, other in zip(mine, theirs, strict=True):
            if bound is not None:
                torch.testing.assert_close(one, other, rtol=bound, atol=bound)
                continue
            away = (one - other).abs()  # a tie may fall the other way: a step of the grid
            step = want.scales[0, :, b, :, 0].float().max()
            assert away.max() <= 1.01 * step
            assert (away > 1e-3).float().mean() < 0.01
    same = (got["kv"] == want.kv).float().mean()
    assert same > 0.99


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint4, torch.uint2], ids=str)
def test_a_damaged_head_is_marked(program, dtype) -> None:
    cache = KVCache(1, 1, 16, 1, 16, dtype)
    qkv = torch.randn(1, 3 * 16)
    qkv[0, 20] = torch.inf
    rows = torch.tensor([[0, 0, 2, 2, 3, 0]])
    got = append(program, cache, 1, qkv, rows, rotation_table(3, 16))
    keys, values = reference.read_cache(got["kv"], got["scales"], 0, 0, 16)
    assert keys[0, 2].isnan().all()
    assert values[0, 2].isfinite().all()


# --- attention -----------------------------------------------------------------------------------


def filled(cache: KVCache, d: int) -> KVCache:
    """Random keys and values in every slot, as the reference stores them."""
    _, _, B, G, T, _ = cache.kv.shape
    coded = cache.scales is not None
    for b in range(B):
        for slot in range(T):
            key, value = (torch.randn(G, d) * (0.5 if coded else 1.0) for _ in range(2))
            reference.write_cache(cache.kv, cache.scales, 0, [0, b, slot, slot], key, value)
    return cache


def attend(program, cache, heads, queries, own, rows, window=0, prompt=False, dtype=F32, seed=0):
    numbers = cache_numbers(cache)
    M, d = rows.shape[0], numbers["head_dim"]
    counters = torch.zeros(attention_counters(M, heads, numbers["kv_heads"]), dtype=torch.int32)
    got = run(
        program, seed, {"out": (dtype, (M, heads * d))}, {"counters": counters}, what="attend",
        M=M, heads=heads, window=window, prompt=int(prompt), queries=queries, own=own, rows=rows,
        kv=cache.kv, scales=cache.scales, dtype=NUMBERS[dtype], **numbers,
    )  # fmt: skip
    assert not got["counters"].any(), "the counters do not start the next launch at zero"
    return got["out"]


def exact(cache, queries, own, rows, window=0) -> Tensor:
    return reference.attend_heads(
        queries.double(), own.double(), rows, cache.kv, cache.scales, 0, window
    )


def heads_for(M: int, heads: int, kv_heads: int, d: int) -> tuple[Tensor, Tensor]:
    return torch.randn(M, heads, d) * 2 / d**0.5, torch.randn(2, M, kv_heads, d)


RAGGED = torch.tensor(
    [
        [0, 0, 0, -1, 0, 0],  # sees itself only
        [0, 0, 4, 4, 5, 0],  # within the first block
        [0, 1, 130, 130, 131, 0],  # one slot of a second split
        [0, 1, 300, -1, 300, 0],  # three splits and itself
        [0, 1, 300, 305, 300, 0b100101],  # and a tree
        [0, 0, 90, 92, 90, -(2**63) | 5],  # a tree that reaches into the next split
    ]
)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(3, 1, 64), (6, 1, 48), (2, 2, 16)])
def test_ragged_rows_see_what_they_should(program, dtype, heads, kv_heads, d) -> None:
    cache = filled(KVCache(1, kv_heads, d, 2, 320, dtype), d)
    queries, own = heads_for(6, heads, kv_heads, d)
    got = attend(program, cache, heads, queries, own, RAGGED)
    torch.testing.assert_close(
        got.double(), exact(cache, queries, own, RAGGED), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize(("window", "dtype"), [(9, F32), (150, BF16), (40, torch.uint4)])
def test_a_window_hides_what_is_far(program, window, dtype) -> None:
    cache = filled(KVCache(1, 1, 32, 2, 320, dtype), 32)
    queries, own = heads_for(6, 4, 1, 32)
    got = attend(program, cache, 4, queries, own, RAGGED, window)
    want = exact(cache, queries, own, RAGGED, window)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    assert (want - exact(cache, queries, own, RAGGED)).abs().max() > 0.01


@pytest.mark.parametrize(("heads", "d"), [(3, 48), (1, 256), (4, 80)])
def test_a_prompt_shares_what_it_reads(program, heads, d) -> None:
    """Tiles that cross rows; the last one has queries missing."""
    cache = filled(KVCache(1, 1, d, 1, 160, BF16), d)
    rows = torch.tensor([[0, 0, s, s, s + 1, 0] for s in range(127, 132)])
    queries, own = heads_for(5, heads, 1, d)
    got = attend(program, cache, heads, queries, own, rows, prompt=True, dtype=BF16)
    want = exact(cache, queries, own, rows)
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "begin", "count", "slots", "window"),
    [
        (3, 1, 64, 0, 50, 64, 0),  # three tiles of queries, the last one ragged
        (4, 2, 128, 100, 20, 144, 0),  # a prompt that goes on; slots end within a tile
        (2, 1, 64, 60, 40, 112, 30),  # tiles that the window hides from some queries
        (1, 1, 128, 0, 5, 16, 0),  # fewer queries than a warp, fewer slots than a tile
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_prompt_on_tensor_cores(
    program, heads, kv_heads, d, begin, count, slots, window, dtype
) -> None:
    """Queries and shares are rounded to 8 bits: 2^-9 each, and the result once more."""
    cache = filled(KVCache(1, kv_heads, d, 2, slots, BF16), d)
    rows = torch.tensor([[0, 1, s, s, s + 1, 0] for s in range(begin, begin + count)])
    rows[-1, 4:] = torch.tensor([rows[-1, 4] - 4, 0b1011])  # a tree, as far as its own slot
    queries, own = heads_for(count, heads, kv_heads, d)
    got = attend(program, cache, heads, queries, own, rows, window, prompt=True, dtype=dtype)
    want = exact(cache, queries, own, rows, window)
    error = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.max() < 0.012
    assert error.median() < 0.006


def test_neighbours_in_a_step_change_no_bit(program) -> None:
    """What makes verification give decoding's very bits; blocks run in another order too."""
    cache = filled(KVCache(1, 2, 64, 2, 320, BF16), 64)
    queries, own = heads_for(6, 6, 2, 64)
    together = attend(program, cache, 6, queries, own, RAGGED)
    for m in (1, 3, 4):
        one = slice(m, m + 1)
        alone = attend(
            program, cache, 6, queries[one].contiguous(), own[:, one].contiguous(), RAGGED[one],
            seed=m,
        )  # fmt: skip
        assert torch.equal(alone[0], together[m])


@pytest.mark.parametrize(
    ("M", "heads", "kv_heads", "d", "slots", "prompt", "plan"),
    [
        (1, 32, 8, 128, 4096, 0, "tiles=1 splits=32 shared=22976 parts=133120"),
        (16, 9, 3, 64, 2048, 0, "tiles=16 splits=16 shared=12736 parts=202752"),
        (1, 9, 3, 64, 112, 0, "tiles=1 splits=1 shared=12736 parts=0"),
        (5, 64, 8, 256, 128, 0, "tiles=10 splits=1 shared=43456 parts=0"),
        (1024, 9, 3, 64, 2048, 1, "tiles=768 splits=1 shared=12736 parts=0"),
    ],
)
def test_plans(program, M, heads, kv_heads, d, slots, prompt, plan) -> None:
    got = run(
        program, what="plan", M=M, heads=heads, kv_heads=kv_heads, head_dim=d, slots=slots, B=1,
        format=1, window=0, prompt=prompt, dtype=0,
    )  # fmt: skip
    assert got["plan"] == plan


# --- logits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("V", [5, 4096, 9001])
def test_the_first_of_the_largest_logits(program, V, dtype) -> None:
    y = (torch.randn(3, V) * 3).to(dtype)
    y[0, [1, V - 1]] = 40.0  # equals in two blocks: the first counts
    y[1] = -torch.inf
    y[1, V // 2] = 1.0
    counters = torch.zeros(3, dtype=torch.int32)
    out = {"logits": (F32, (3, V)), "best": (torch.int64, (3,)), "share": (F32, (3,))}
    got = run(
        program, 0, out, {"counters": counters}, what="logits", M=3, V=V, y=y, dtype=NUMBERS[dtype]
    )
    assert not got["counters"].any()
    assert torch.equal(got["logits"], y.float())
    assert torch.equal(got["best"], y.float().argmax(-1))
    share = y.double().softmax(-1).amax(-1)
    torch.testing.assert_close(got["share"].double(), share, rtol=1e-5, atol=0)
