"""lowbit_gemm against its specification, against itself on every instruction set, and bad input."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import best_isa, force_isa
from saltire.ops.isa import ISAS
from saltire.ops.lowbit_gemm import lowbit_gemm, pack_weight, prepack_weight
from saltire.reference import lowbit_gemm as reference


@dataclass(frozen=True)
class Problem:
    """Inputs of one product; ``run`` computes it, ``expected`` specifies it in float64."""

    codes: Tensor
    x_scale: Tensor
    x_sum: Tensor
    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group: int
    act_bits: int

    @property
    def n(self) -> int:
        return self.packed.shape[0]

    @property
    def prepacked(self) -> Tensor:
        return prepack_weight(self.packed, self.scale, self.zero, self.bits, self.group)

    def run(self, **options) -> Tensor:
        return lowbit_gemm(
            self.codes,
            self.x_scale,
            self.x_sum,
            self.prepacked,
            self.n,
            self.bits,
            self.group,
            act_bits=self.act_bits,
            **options,
        )

    def expected(self, **options) -> Tensor:
        return reference.lowbit_gemm(
            self.codes,
            self.x_scale,
            self.x_sum,
            self.packed,
            self.scale,
            self.zero,
            self.bits,
            self.group,
            **options,
        )


def make_problem(
    M: int,
    N: int,
    K: int,
    bits: int = 4,
    group: int = 0,
    act_bits: int = 4,
    zero: bool = False,
    dtype: torch.dtype = torch.float32,
    extreme: bool = False,
) -> Problem:
    """Random codes over the whole range; ``extreme``: only the largest, to provoke overflow."""
    Q = 2 ** (act_bits - 1) - 1
    top = 2**bits - 1
    codes = torch.randint(-Q, Q + 1, (M, K), dtype=torch.int8)
    u = torch.randint(0, top + 1, (N, K), dtype=torch.uint8)
    if extreme:
        codes = codes.fill_(Q)
        codes[1::2] = -Q
        u = u.fill_(top)
    G = group or K
    scale = (torch.rand(N, K // G) + 0.5).to(dtype) / 64
    zeros = (torch.rand(N, K // G) * top).to(dtype) if zero else None
    sums = codes.int().reshape(M, K // G, G).sum(-1, dtype=torch.int32)
    return Problem(
        codes,
        torch.rand(M) + 0.5,
        sums,
        pack_weight(u, bits),
        scale,
        zeros,
        bits,
        group,
        act_bits,
    )


# M: 1 decode, 2..12 one tile of rows, 13 and 64 several tiles of unequal and equal height.
ROWS = [1, 2, 3, 5, 12, 13, 64]
# N: a whole block, less than one block, blocks and a remainder. K: one step pair, several, per-
# channel sums long enough to leave 16 bits many times over (AVX2).
SHAPES = [(32, 32), (1, 64), (100, 384), (33, 4096)]


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_product_equals_specification(isa: str, M: int, N: int, K: int, bits: int) -> None:
    for act_bits in (3, 4, 8):
        problem = make_problem(M, N, K, bits, act_bits=act_bits)
        torch.testing.assert_close(problem.run().double(), problem.expected(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("group", [0, 32, 64, 96, 128])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_and_zero_points_equal_specification(
    isa: str, group: int, zero: bool, dtype: torch.dtype, bits: int
) -> None:
    problem = make_problem(7, 72, 384, bits, group, 8, zero, dtype)
    atol = 1e-4 * (16 if bits == 8 else 1)  # as large as the codes are
    torch.testing.assert_close(problem.run().double(), problem.expected(), rtol=1e-5, atol=atol)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_bits", [3, 4, 8])
@pytest.mark.parametrize("extreme", [False, True])
def test_integer_sums_are_exact(isa: str, M: int, bits: int, act_bits: int, extreme: bool) -> None:
    """With scales 1 and zeros 0 the result is the integer sum itself (K: below 2^24 in float32)."""
    K = 512 if bits == 8 else 4096
    problem = make_problem(M, 48, K, bits, act_bits=act_bits, extreme=extreme)
    exact = Problem(
        problem.codes,
        torch.ones(M),
        problem.x_sum,
        problem.packed,
        torch.ones(48, 1),
        torch.zeros(48, 1),
        bits,
        0,
        act_bits,
    )
    u = reference.unpack_weight(problem.packed, bits).long()
    assert torch.equal(exact.run().long(), problem.codes.long() @ u.T)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "zero"), [(0, False), (64, False), (32, True)])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("M", [1, 9, 30])
def test_every_isa_gives_the_same_bits(
    M: int, bits: int, group: int, zero: bool, out_dtype: torch.dtype
) -> None:
    problem = make_problem(M, 100, 512, bits, group, 8, zero, torch.float16)
    options = {
        "bias": torch.randn(100),
        "low_rank_x": torch.randn(M, 5),
        "low_rank_w": torch.randn(5, 100),
        "out_dtype": out_dtype,
    }
    results = []
    for name in ISAS[: ISAS.index(best_isa()) + 1]:
        with force_isa(name):
            results.append(problem.run(**options))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize("rank", [0, 1, 33])
def test_bias_and_low_rank_branch_are_added(isa: str, M: int, rank: int) -> None:
    problem = make_problem(M, 70, 64)
    options = {
        "bias": torch.randn(70),
        "low_rank_x": torch.randn(M, rank),
        "low_rank_w": torch.randn(rank, 70),
    }
    torch.testing.assert_close(
        problem.run(**options).double(), problem.expected(**options), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_low_precision_output_is_the_rounded_float_output(isa: str, out_dtype: torch.dtype) -> None:
    problem = make_problem(6, 45, 128)
    assert torch.equal(problem.run(out_dtype=out_dtype), problem.run().to(out_dtype))


def test_float16_output_rounds_overflows_and_underflows_as_torch_does(isa: str) -> None:
    """Around every edge of float16: denormals, the smallest, the largest, infinity, NaN."""
    edges = torch.tensor([0.0, 2**-26, 2**-25, 1.5 * 2**-25, 2**-24, 2**-14, 65504.0, 65519.0])
    edges = torch.cat([edges, torch.tensor([65520.0, 1e30, float("inf"), float("nan")])])
    bias = torch.cat([edges, -edges, torch.randn(29) * 1e-5])  # not a multiple of 8
    N = len(bias)
    problem = make_problem(1, N, 32)
    silent = Problem(**{**vars(problem), "x_scale": torch.zeros(1)})
    for out_dtype in (torch.float16, torch.bfloat16):
        result = silent.run(bias=bias, out_dtype=out_dtype)
        expected = bias.to(out_dtype)[None]
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_float16_scales_give_what_their_float32_values_give(isa: str) -> None:
    """Over all finite halves, denormals among them."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()][::31][:2048].reshape(-1, 1)
    problem = make_problem(1, len(halves), 32)
    as_half = Problem(**{**vars(problem), "scale": halves})
    as_float = Problem(**{**vars(problem), "scale": halves.float()})
    assert torch.equal(as_half.run(), as_float.run())


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(isa: str, threads: int) -> None:
    problem = make_problem(70, 300, 512, group=128)
    before = torch.get_num_threads()
    expected = problem.run()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(problem.run(), expected)
    finally:
        torch.set_num_threads(before)


def test_no_tokens_give_an_empty_result(isa: str) -> None:
    result = make_problem(0, 40, 64).run(out_dtype=torch.bfloat16)
    assert result.shape == (0, 40)
    assert result.dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_marked_token_poisons_its_row_and_no_other(isa: str, bad: float) -> None:
    problem = make_problem(5, 40, 64)
    expected = problem.run()
    problem.x_scale[2] = bad
    result = problem.run()
    assert not result[2].isfinite().any()
    assert torch.equal(result[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


def test_views_are_made_right(isa: str) -> None:
    problem = make_problem(6, 64, 128, group=64)
    low_rank_x, low_rank_w = torch.randn(6, 4), torch.randn(4, 64)
    expected = problem.run(low_rank_x=low_rank_x, low_rank_w=low_rank_w)
    views = Problem(
        problem.codes.T.contiguous().T,
        problem.x_scale.repeat_interleave(2)[::2],
        problem.x_sum.T.contiguous().T,
        problem.packed.T.contiguous().T,
        problem.scale.T.contiguous().T,
        None,
        4,
        64,
        4,
    )
    result = views.run(
        low_rank_x=low_rank_x.T.contiguous().T, low_rank_w=low_rank_w.T.contiguous().T
    )
    assert torch.equal(result, expected)


def test_a_buffer_at_an_odd_address_works(isa: str) -> None:
    problem = make_problem(3, 64, 128, group=32, dtype=torch.float16)
    w = problem.prepacked
    moved = torch.cat([torch.zeros(1, dtype=torch.uint8), w])[1:]
    args = (problem.codes, problem.x_scale, problem.x_sum)
    assert torch.equal(lowbit_gemm(*args, moved, 64, 4, 32), lowbit_gemm(*args, w, 64, 4, 32))


@pytest.mark.parametrize("test", ["test_schema", "test_autograd_registration", "test_faketensor"])
def test_ops_pass_opcheck(test: str) -> None:
    problem = make_problem(3, 40, 128, group=32, zero=True)
    u = reference.unpack_weight(problem.packed, 4)
    ops = torch.ops.saltire
    w = problem.prepacked
    calls = [
        (ops.pack_weight, (u, 4), {}),
        (ops.unpack_weight, (problem.packed, 4), {}),
        (ops.lowbit_prepack, (problem.packed, problem.scale, problem.zero, 4, 32), {}),
        (ops.lowbit_prepack, (problem.packed, problem.scale, None, 4, 32), {}),
        (ops.lowbit_unprepack, (w, 40, 128, 4, 32, True, torch.float32), {}),
        (
            ops.lowbit_gemm,
            (problem.codes, problem.x_scale, problem.x_sum, w, 40, 4, 32),
            {"act_bits": 4, "out_dtype": torch.bfloat16, "bias": torch.randn(40)},
        ),
    ]
    for op, args, kwargs in calls:
        torch.library.opcheck(op, args, kwargs, test_utils=test)


def call(problem: Problem, **changes) -> Tensor:
    args = {
        "codes": problem.codes,
        "x_scale": problem.x_scale,
        "x_sum": problem.x_sum,
        "w": problem.prepacked,
        "n": problem.n,
        "bits": problem.bits,
        "group": problem.group,
    }
    return lowbit_gemm(**{**args, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "2, 3, 4 or 8 bits"),
        ({"act_bits": 9}, "3 to 8 bits"),
        ({"act_bits": 4}, "outside -7..7"),
        ({"codes": torch.zeros(3, 96, dtype=torch.int8)}, "prepacked with N = 40, K = 128"),
        ({"codes": torch.zeros(3, 100, dtype=torch.int8)}, "K = 100 is not a multiple of 32"),
        ({"codes": torch.zeros(3, 128)}, "codes is float32 \\[3, 128\\]; expected int8"),
        ({"x_scale": torch.ones(4)}, "x_scale is float32 \\[4\\]"),
        ({"x_scale": torch.ones(3, dtype=torch.float64)}, "expected float32"),
        ({"x_sum": torch.zeros(3, 1, dtype=torch.int32)}, "K / group"),
        ({"x_sum": torch.zeros(3, 4)}, "expected int32"),
        ({"n": 41}, "prepacked with N = 40"),
        ({"group": 64}, "prepacked with N = 40, K = 128, bits = 4, group = 32"),
        ({"group": 48}, "multiple of 32 that divides K"),
        ({"w": torch.zeros(10, dtype=torch.uint8)}, "10 bytes"),
        ({"w": torch.zeros(1000, dtype=torch.uint8)}, "not a prepacked weight"),
        ({"bias": torch.zeros(3)}, "bias is float32 \\[3\\]"),
        ({"bias": torch.zeros(40, dtype=torch.bfloat16)}, "bias is bfloat16"),
        ({"low_rank_x": torch.zeros(3, 2)}, "given together"),
        ({"low_rank_x": torch.zeros(3, 2), "low_rank_w": torch.zeros(3, 40)}, "R, as in"),
        ({"out_dtype": torch.float64}, "float32, bfloat16 or float16"),
    ],
)
def test_wrong_arguments_are_refused_by_name(changes: dict, message: str) -> None:
    problem = make_problem(3, 40, 128, group=32, act_bits=8)
    with pytest.raises(SaltireError, match=message):
        call(problem, **changes)


@pytest.mark.parametrize(
    ("offset", "message"),
    [(0, "not a prepacked"), (4, "in format"), (8, "truncated or altered"), (24, "truncated")],
)
def test_altered_headers_are_refused(offset: int, message: str) -> None:
    problem = make_problem(3, 40, 128)
    w = problem.prepacked
    w[offset] = 77
    with pytest.raises(SaltireError, match=message):
        call(problem, w=w)


def test_a_truncated_buffer_is_refused() -> None:
    problem = make_problem(3, 40, 128)
    with pytest.raises(SaltireError, match="truncated"):
        call(problem, w=problem.prepacked[:-64])


@pytest.mark.slow
def test_offsets_do_not_wrap_beyond_two_to_the_31_outputs() -> None:
    """Needs about 5 GB: more than 2**31 results in bf16."""
    M, N, K = 2**20 + 16, 2048, 64
    assert M * N > 2**31
    codes = torch.randint(-7, 8, (16, K), dtype=torch.int8).repeat(M // 16, 1)
    codes[-16:] = torch.randint(-7, 8, (16, K), dtype=torch.int8)
    scale, total = torch.ones(M), codes.sum(1, keepdim=True, dtype=torch.int32)
    packed = pack_weight(torch.randint(0, 16, (N, K), dtype=torch.uint8), 4)
    weight = prepack_weight(packed, torch.rand(N, 1), None, 4)
    options = {"n": N, "bits": 4, "act_bits": 4, "out_dtype": torch.bfloat16}
    got = lowbit_gemm(codes, scale, total, weight, **options)
    want = lowbit_gemm(codes[-16:].clone(), scale[-16:], total[-16:], weight, **options)
    assert torch.equal(got[-16:], want)


@pytest.mark.parametrize("zero", [False, True])
def test_eight_bits_stay_exact_where_their_unsigned_sums_outgrow_a_float(
    isa: str, zero: bool
) -> None:
    """Tokens that are all positive: Σ x·u is some 2^29, Σ x·(u - 128) stays small."""
    problem = make_problem(3, 32, 32768, 8, act_bits=8, zero=zero)
    codes = problem.codes.abs()
    problem = replace(problem, codes=codes, x_sum=codes.sum(-1, keepdim=True, dtype=torch.int32))
    if zero:
        problem = replace(problem, zero=torch.full_like(problem.zero, 128.0))
    error = (problem.run().double() - problem.expected()).norm()
    assert error < 2e-7 * problem.expected().norm()


def test_more_inputs_than_sums_of_eight_bits_can_hold_are_refused() -> None:
    codes = torch.zeros(1, 65568, dtype=torch.uint8)
    with pytest.raises(SaltireError, match="8-bit weights are exact only up to K = 65536"):
        prepack_weight(codes, torch.ones(1, 1), None, 8)
    prepack_weight(codes[:, :65536], torch.ones(1, 1), None, 8)
