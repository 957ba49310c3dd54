"""token_stats' CUDA kernels on the emulator, held to the specification."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saltire import ops
from saltire.ops.token_stats import TokenStats, merge_shards
from saltire.reference import token_stats as reference
from tests.cuda_on_cpu.emulate import build, run

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATS = ("logprob", "entropy", "logsumexp", "max", "log_sum")
GRADIENTS = ("logprob", "entropy", "logsumexp")
FLOATS, MMA, SM90 = 0, 1, 2


@pytest.fixture(scope="module")
def program() -> Path:
    return build("token_stats")


def common(M: int, labels: Tensor | None, temperature: Tensor | None, softcap: float) -> dict:
    return {
        "M": M,
        "labels": labels,
        "temperature": torch.ones(1) if temperature is None else temperature,
        "own_temperature": float(temperature is not None and temperature.numel() == M),
        "softcap": softcap,
    }


def outputs(M: int) -> dict:
    floats = dict.fromkeys(STATS, (torch.float32, (M,)))
    return {**floats, "argmax": (torch.int64, (M,))}


def rows(program, x, labels=None, temperature=None, softcap=0.0, seed=0, **more):
    M, V = x.shape
    return run(
        program, seed, outputs(M), what="rows", x=x, V=V, dtype=DTYPES[x.dtype],
        **common(M, labels, temperature, softcap), **more,
    )  # fmt: skip


def linear(program, hidden, head, labels=None, bias=None, temperature=None, softcap=0.0, seed=0,
           **more):  # fmt: skip
    M, D = hidden.shape
    return run(
        program, seed, outputs(M), what="linear", hidden=hidden, head=head, bias=bias, D=D,
        V=head.shape[0], hidden_dtype=DTYPES[hidden.dtype], head_dtype=DTYPES[head.dtype],
        **common(M, labels, temperature, softcap), **more,
    )  # fmt: skip


def check(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 4e-6) -> None:
    for name in ("logprob", "entropy", "logsumexp"):
        if name not in want:
            continue
        scale = max(1.0, float(want[name].abs().max()))
        torch.testing.assert_close(
            got[name].double(), want[name].detach(), rtol=0, atol=tolerance * scale
        )
    torch.testing.assert_close(
        (-got["log_sum"]).exp().double(), want["max_prob"].detach(), rtol=0, atol=1e-5
    )
    assert torch.equal(got["argmax"], want["argmax"])


def ignored(want: dict[str, Tensor], token: int) -> dict[str, Tensor]:
    want["max_prob"] = want["max_prob"].index_fill(0, torch.tensor(token), 1.0)
    want["argmax"][token] = 0
    return want


# V: less than a vector; off every width; chunks of one block, whole and partial; several of them.
@pytest.mark.parametrize("V", [1, 3, 41, 1000, 8192, 20_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stats_of_logits(program, V, dtype) -> None:
    x = (torch.randn(3, V) * 4).to(dtype)
    labels = torch.randint(0, V, (3,))
    got = rows(program, x, labels, seed=V)
    check(got, reference.token_stats(x, labels))
    if dtype == torch.float32 and V == 1000:
        assert got["plan"] == "threads=256 vector"


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_masks_caps_temperatures_and_ignored_tokens(program, softcap) -> None:
    x = torch.randn(6, 777) * 6
    x[:, 1:][torch.rand(6, 776) < 0.3] = -torch.inf
    x[4, 1:] = -torch.inf
    labels = torch.zeros(6, dtype=torch.int64)
    labels[2] = -100
    temperature = torch.rand(6) + 0.3
    want = reference.token_stats(x, labels, temperature, softcap)
    check(rows(program, x, labels, temperature, softcap), ignored(want, 2))


@pytest.mark.parametrize("skew", [2, 6, 14])
def test_rows_may_start_anywhere(program, skew) -> None:
    x = torch.randn(4, 333).bfloat16()
    check(rows(program, x, skew_x=skew), reference.token_stats(x))


def test_the_lowest_of_equal_logits_is_the_argmax(program) -> None:
    x = torch.zeros(3, 9001, dtype=torch.bfloat16)
    x[0, [90, 91, 4100, 9000]] = 1.0
    x[1, [4100, 9000]] = 1.0
    x[2, 9000] = 1.0
    assert rows(program, x)["argmax"].tolist() == [90, 4100, 9000]


def test_entropy_near_collapse_keeps_its_digits(program) -> None:
    for offset in (0.0, 300.0):
        x = torch.randn(2, 20_000)
        x[:, 5] = 26.0
        x += offset
        labels = torch.full((2,), 5)
        got, want = rows(program, x, labels), reference.token_stats(x, labels)
        assert 1e-6 < float(want["entropy"].mean()) < 1e-3
        assert float((got["entropy"] - want["entropy"]).abs().max()) < 1e-6
        assert float((got["logprob"] - want["logprob"]).abs().max()) < 1e-6


def test_extreme_logits_stay_finite(program) -> None:
    x = torch.stack([torch.full((50,), -1e30), torch.full((50,), 1e30), torch.zeros(50)])
    x[2, 3] = 3e38
    got = rows(program, x, torch.full((3,), 3))
    ln = torch.tensor(50.0).log()
    torch.testing.assert_close(got["entropy"], torch.stack([ln, ln, ln * 0]), rtol=0, atol=1e-6)


def test_what_has_no_distribution_is_nan(program) -> None:
    """A NaN, +inf, all masked; a label out of range, a temperature of 0: the op then names it."""
    x = torch.randn(8, 300)
    x[1, 7], x[2, 7], x[3] = torch.nan, torch.inf, -torch.inf
    labels = torch.tensor([0, 0, 0, 0, 300, -1, 5, 299])
    temperature = torch.ones(8)
    temperature[6] = 0.0
    got = rows(program, x, labels, temperature)
    assert got["log_sum"].isnan().tolist() == [False, *[True] * 6, False]
    hidden = torch.randn(2, 8).bfloat16()
    hidden[1, 3] = torch.nan
    for route in (SM90, MMA, FLOATS):
        bad = linear(program, hidden, torch.randn(40, 8).bfloat16(), route=route)
        assert bad["entropy"].isnan().tolist() == [False, True]


def test_no_tokens(program) -> None:
    assert rows(program, torch.zeros(0, 8))["entropy"].shape == (0,)
    assert linear(program, torch.zeros(0, 8), torch.zeros(9, 8))["entropy"].shape == (0,)


def test_shards_merge_to_the_whole(program) -> None:
    x = torch.randn(4, 900) * 5 + 200
    x[2, :300] = -torch.inf
    labels = torch.randint(300, 900, (4,))
    parts = []
    for a, b in itertools.pairwise([0, 300, 700, 900]):
        got = rows(program, x[:, a:b].contiguous(), labels, first=a, vocabulary=900)
        parts.append(TokenStats(*(got[n] for n in ("logprob", "entropy", "logsumexp", "argmax",
                                                   "max", "log_sum"))))  # fmt: skip
    merged = merge_shards(parts)
    want = reference.token_stats(x, labels)
    for name in ("logprob", "entropy", "logsumexp"):
        torch.testing.assert_close(getattr(merged, name).double(), want[name], rtol=2e-6, atol=4e-6)
    assert torch.equal(merged.argmax, want["argmax"])


# --- gradients ----------------------------------------------------------------------------------


def exact_gradients(want: dict[str, Tensor], weights: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    total = sum((want[n] * w.double()).sum() for n, w in zip(GRADIENTS, weights, strict=True))
    return [g.nan_to_num() for g in torch.autograd.grad(total, inputs)]


def saved(stats: TokenStats) -> dict[str, Tensor]:
    return {"max": stats.max_logit, "log_sum": stats.log_sum, "entropy": stats.entropy}


def incoming(weights: Tensor) -> dict[str, Tensor]:
    return dict(zip(("d_logprob", "d_entropy", "d_lse"), weights, strict=True))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [5, 333, 4700])
def test_gradient_of_logits(program, V, dtype, softcap) -> None:
    x = (torch.randn(4, V) * 3).to(dtype)
    x[:, 1:][torch.rand(4, V - 1) < 0.2] = -torch.inf
    labels = torch.tensor([0, V - 1, -100, 0])
    x[1, V - 1] = 0.5
    temperature, weights = torch.rand(4) + 0.5, torch.randn(3, 4)
    stats = ops.token_stats(x, labels, temperature=temperature, softcap=softcap or None)
    exact = x.double().requires_grad_()
    (want,) = exact_gradients(
        reference.token_stats(exact, labels, temperature, softcap), weights, [exact]
    )
    for skew in (0, 4):
        got = run(
            program, V, {"dx": (dtype, (4, V))}, what="rows_backward", x=x, V=V,
            dtype=DTYPES[dtype], skew_x=skew, **saved(stats), **incoming(weights),
            **common(4, labels, temperature, softcap),
        )  # fmt: skip
        assert got["plan"].endswith("scalar" if skew else "vector")
        step = torch.finfo(dtype).eps / 2 * 1.05 if dtype != torch.float32 else 2e-5
        torch.testing.assert_close(got["dx"].double(), want, rtol=step, atol=2e-6)


# tokens, D, V: one of all; off every width of a tile; several tiles, splits and stages.
LINEAR = [(1, 1, 1), (5, 7, 30), (70, 20, 201), (130, 40, 300)]


@pytest.mark.parametrize("shape", LINEAR)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_linear_in_floats(program, shape, softcap) -> None:
    M, D, V = shape
    dtypes = list(DTYPES)
    hidden = torch.randn(M, D).to(dtypes[M % 3])
    head, bias = (torch.randn(V, D) / D**0.5 * 2).to(dtypes[V % 3]), torch.randn(V)
    labels, temperature = torch.randint(0, V, (M,)), torch.rand(M) + 0.5
    got = linear(program, hidden, head, labels, bias, temperature, softcap, seed=M, route=FLOATS)
    want = reference.linear_token_stats(
        hidden, head, labels, bias, temperature=temperature, softcap=softcap
    )
    check(got, want, 5e-6)


# D: less than a stage; several stages, the last one partial. V: a partial tile, several of them.
MMA_SHAPES = [(1, 8, 1), (9, 24, 130), (150, 136, 300)]


@pytest.mark.parametrize("shape", MMA_SHAPES)
@pytest.mark.parametrize(("softcap", "route"), [(0.0, MMA), (4.0, MMA), (0.0, SM90), (4.0, SM90)])
def test_linear_on_tensor_cores(program, shape, softcap, route) -> None:
    M, D, V = shape
    hidden, head = torch.randn(M, D).bfloat16(), (torch.randn(V, D) / D**0.5 * 2).bfloat16()
    labels, temperature, bias = torch.randint(0, V, (M,)), torch.rand(M) + 0.5, torch.randn(V)
    got = linear(program, hidden, head, labels, bias, temperature, softcap, seed=M, route=route)
    assert got["plan"].startswith("mma" if route == MMA else "sm90")
    want = reference.linear_token_stats(
        hidden, head, labels, bias, temperature=temperature, softcap=softcap
    )
    check(got, want, 5e-6)


def test_ignored_tokens_and_ties_of_the_linear_form(program) -> None:
    hidden, head = torch.ones(3, 8).bfloat16(), torch.zeros(400, 8).bfloat16()
    head[[90, 91, 200, 350]] = 1.0
    labels = torch.tensor([4, -100, 90])
    for route in (SM90, MMA, FLOATS):
        got = linear(program, hidden, head, labels, route=route, multiprocessors=2)
        assert got["argmax"].tolist() == [90, 0, 90]
        assert got["entropy"][1] == got["logsumexp"][1] == got["log_sum"][1] == 0


def linear_backward(program, case: dict, wanted: tuple[str, ...], route: int, seed: int = 0):
    hidden, head = case["hidden"], case["head"]
    (M, D), V = hidden.shape, head.shape[0]
    shapes = {
        "d_hidden": (torch.float32, (M, D)),
        "d_head": (head.dtype, (V, D)),
        "d_bias": (torch.float32, (V,)),
    }
    return run(
        program, seed, {name: shapes[name] for name in wanted}, what="linear_backward", D=D, V=V,
        hidden_dtype=DTYPES[hidden.dtype], head_dtype=DTYPES[head.dtype], route=route, **case,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "route", "dtype"),
    [
        ((1, 1, 1), FLOATS, torch.float32),
        ((70, 20, 201), FLOATS, torch.float32),
        ((33, 24, 90), FLOATS, torch.float16),
        ((1, 8, 1), MMA, torch.bfloat16),
        ((130, 40, 300), MMA, torch.bfloat16),
        ((1, 8, 1), SM90, torch.bfloat16),
        ((130, 40, 300), SM90, torch.bfloat16),
        ((70, 328, 520), SM90, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_gradient_of_the_linear_form(program, shape, route, dtype, softcap) -> None:
    """All three gradients, in chunks of one tile, against float64 of the same inputs."""
    M, D, V = shape
    hidden, head = torch.randn(M, D).to(dtype), (torch.randn(V, D) / D**0.5 * 2).to(dtype)
    bias, labels = torch.randn(V), torch.randint(0, V, (M,))
    labels[M // 2] = -100 if M > 1 else 0
    temperature, weights = torch.rand(M) + 0.5, torch.randn(3, M)
    stats = ops.linear_token_stats(
        hidden, head, labels, bias=bias, temperature=temperature, softcap=softcap or None
    )
    exact = [t.double().requires_grad_() for t in (hidden, head, bias)]
    want = exact_gradients(
        reference.linear_token_stats(
            exact[0], exact[1], labels, exact[2], temperature=temperature, softcap=softcap
        ),
        weights,
        exact,
    )
    case = {
        "hidden": hidden, "head": head, "bias": bias, "chunk": (64, 128, 256)[route],
        **saved(stats), **incoming(weights), **common(M, labels, temperature, softcap),
    }  # fmt: skip
    names = ("d_hidden", "d_head", "d_bias")
    got = linear_backward(program, case, names, route, seed=V)
    # dx is rounded to bf16 on its way to the second product, dW to the head's dtype.
    rounding = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    for name, exact_value in zip(names, want, strict=True):
        error = (got[name].double() - exact_value).norm()
        assert error <= rounding * exact_value.norm() + 1e-6, f"{name}: {error}"


def test_gradients_that_nobody_wants_are_not_made(program) -> None:
    hidden, head = torch.randn(9, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    labels, weights = torch.randint(0, 50, (9,)), torch.randn(3, 9)
    stats = ops.linear_token_stats(hidden, head, labels)
    case = {
        "hidden": hidden, "head": head, **saved(stats), **incoming(weights),
        **common(9, labels, None, 0.0),
    }  # fmt: skip
    frozen = linear_backward(program, case, ("d_hidden",), MMA)
    trained = linear_backward(program, case, ("d_hidden", "d_head"), MMA, seed=1)
    assert torch.equal(frozen["d_hidden"], trained["d_hidden"])
    # One gradient alone: the others count as 0.
    del case["d_entropy"], case["d_lse"]
    exact = hidden.double().requires_grad_()
    want = reference.linear_token_stats(exact, head, labels)["logprob"] @ weights[0].double()
    (dh,) = torch.autograd.grad(want, [exact])
    got = linear_backward(program, case, ("d_hidden",), MMA)["d_hidden"]
    assert (got.double() - dh).norm() < 6e-3 * dh.norm()


def test_no_tokens_give_a_head_without_gradient(program) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = {
            "hidden": torch.zeros(0, 8, dtype=dtype), "head": torch.zeros(3, 8, dtype=dtype),
            **common(0, None, None, 0.0),
        }  # fmt: skip
        got = linear_backward(program, case, ("d_head", "d_bias"), FLOATS)
        assert float(got["d_head"].abs().sum() + got["d_bias"].abs().sum()) == 0


# --- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_", [1, 2, 64])
@pytest.mark.parametrize(("columns", "slots"), [(1, 264), (3, 264), (384, 264), (32, 3)])
def test_every_tile_has_one_owner(program, rows_, columns, slots) -> None:
    got = run(program, what="tiling", rows=rows_, columns=columns, slots=slots)["tiles"]
    seen = []
    for word in got.split():
        row, span = word.split(":")
        begin, end = map(int, span.split("-"))
        assert begin < end
        seen += [(int(row), tile) for tile in range(begin, end)]
    assert sorted(seen) == list(itertools.product(range(rows_), range(columns)))


def test_plans_of_a_large_head(program) -> None:
    """8,192 tokens, D = 4,096, V = 131,072: the workspace stays below 300 MB with dh's 134 MB."""
    shape = {"what": "plan", "M": 8192, "D": 4096, "V": 131_072, "temperature": torch.ones(1)}
    for sm, start in ((80, "mma tiles=64x1024 splits="), (90, "sm90 tiles=32x512 splits=")):
        plan = run(program, hidden_dtype=1, head_dtype=1, sm=sm, **shape)["plan"]
        assert plan.startswith(start)
        words = dict(word.split("=") for word in plan.split()[1:])
        assert int(words["chunk"]) == 8192
        assert int(words["forward"]) + int(words["backward"]) + 8192 * 4096 * 4 < 300e6
    assert run(program, hidden_dtype=1, head_dtype=0, **shape)["plan"].startswith("floats")
