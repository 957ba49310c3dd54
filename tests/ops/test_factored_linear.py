"""ops.factored_gemm: the chain of the ops it stands for, bit by bit."""

from __future__ import annotations

import pytest
import torch

from saltire import ops
from saltire.errors import SaltireError
from tests.conftest import AVAILABLE_ISAS


def weight(N: int, K: int, bits: int, group: int = 0) -> torch.Tensor:
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
    scale = torch.rand(N, K // (group or K)) + 0.5
    return ops.prepack_weight(ops.pack_weight(codes, bits), scale, None, bits, group)


def problem(M: int, N: int, K: int, R: int, bits: int, act_bits: int, group: int = 0):
    torch.manual_seed(0)
    tokens = ops.transform_quantize(torch.randn(M, K), act_bits, sum_group=group)
    return tokens, weight(R, K, bits, group), weight(N, R, bits, group), torch.randn(N)


@pytest.mark.parametrize(
    ("M", "N", "K", "R", "bits", "act_bits", "group"),
    [
        (1, 96, 128, 64, 4, 4, 0),  # decoding
        (7, 70, 64, 32, 2, 8, 32),  # outputs that are no whole panel, groups
        (50, 33, 96, 96, 3, 4, 0),
        (300, 64, 64, 1024, 4, 4, 0),  # three blocks of rows
    ],
)
def test_it_equals_the_chain_of_products_and_rounding_bitwise(
    M, N, K, R, bits, act_bits, group, isa: str
) -> None:
    tokens, down, up, bias = problem(M, N, K, R, bits, act_bits, group)
    diag = torch.rand(R) + 0.5
    how = {"diag": diag, "hadamard": 32, "clip": 0.9}
    z = ops.lowbit_gemm(*tokens, down, R, bits, group, act_bits=act_bits)
    middle = ops.transform_quantize(z, act_bits, sum_group=group, **how)
    want = ops.lowbit_gemm(*middle, up, N, bits, group, act_bits=act_bits, bias=bias)
    got = ops.factored_gemm(
        *tokens, down, up, N, act_bits=act_bits, rank_bits=act_bits, bias=bias, **how
    )
    assert torch.equal(got, want)


def test_threads_and_instruction_sets_change_no_bit() -> None:
    tokens, down, up, _ = problem(200, 96, 128, 64, 4, 4)
    before, results = torch.get_num_threads(), []
    try:
        for name in AVAILABLE_ISAS:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with ops.force_isa(name):
                    results.append(
                        ops.factored_gemm(*tokens, down, up, 96, act_bits=4, rank_bits=4)
                    )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_no_rows_give_no_rows() -> None:
    tokens, down, up, _ = problem(3, 64, 64, 32, 4, 4)
    empty = [t[:0] for t in tokens]
    assert ops.factored_gemm(*empty, down, up, 64, act_bits=4, rank_bits=4).shape == (0, 64)


def test_the_schema_keeps_its_promises() -> None:
    tokens, down, up, bias = problem(3, 64, 64, 32, 4, 4)
    torch.library.opcheck(
        torch.ops.saltire.factored_gemm.default,
        (*tokens, down, up, 64),
        {"act_bits": 4, "rank_bits": 4, "bias": bias},
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"up": "down"}, "down gives 32 ranks and up takes 64"),
        ({"n": 65}, "up gives 64 outputs, but n = 65"),
        ({"rank_bits": 5}, "rank_bits = 5; expected 3, 4 or 8"),
        ({"clip": 0.0}, "clip = 0"),
        ({"hadamard": 24}, "a rotation of blocks of 24 for 32 ranks"),
        ({"bias": torch.zeros(5)}, r"bias is float32 \[5\]; expected 64"),
        ({"diag": torch.zeros(5)}, r"diag is float32 \[5\]; expected 32"),
        ({"act_bits": 3}, r"codes holds a value outside -3\.\.3"),
        ({"codes": torch.zeros(3, 32, dtype=torch.int8)}, "dimension 1 to be 64"),
        ({"down": torch.zeros(8, dtype=torch.uint8)}, "prepack"),
    ],
)
def test_what_does_not_fit_is_refused(change, message) -> None:
    (codes, scale, sums), down, up, _ = problem(3, 64, 64, 32, 4, 4)
    arguments = {"codes": codes, "down": down, "up": up, "n": 64}
    options = {"act_bits": 4, "rank_bits": 4}
    for name, value in change.items():
        place = arguments if name in arguments else options
        place[name] = down if value == "down" else value
    with pytest.raises(SaltireError, match=message):
        ops.factored_gemm(
            arguments["codes"],
            scale,
            sums,
            arguments["down"],
            arguments["up"],
            arguments["n"],
            **options,
        )
