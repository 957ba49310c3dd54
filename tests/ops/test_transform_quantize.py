"""transform_quantize: equal on every instruction set, orthogonal, and rounded as specified."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saltire import ops
from saltire.errors import SaltireError
from saltire.ops import force_isa
from saltire.reference import transform_quantize as reference
from saltire.reference.transform_quantize import hartley_matrix

# K, hadamard, A of left, B of right; each size says which path it takes.
SHAPES = {
    "no rotation": (96, 1, 0, 0),
    "K not a multiple of a vector": (100, 4, 0, 0),
    "Hadamard inside one vector": (96, 8, 0, 0),
    "one AVX-512 vector": (48, 16, 0, 0),
    "two stages across vectors": (192, 64, 0, 0),
    "an odd number of stages across vectors": (384, 128, 0, 0),
    "whole token, 12 stages": (4096, 4096, 0, 0),
    "left and Hadamard": (576, 64, 9, 0),
    "left with many rows": (11008, 256, 43, 0),
    "Kronecker of dense factors": (1536, 1, 24, 64),
    "dense factors off the vector width": (150, 1, 15, 10),
    "dense right alone": (256, 1, 0, 32),
}


def arguments(shape: tuple[int, int, int, int], diagonal: bool = True) -> dict[str, object]:
    K, hadamard, A, B = shape
    return {
        "diag": torch.rand(K) + 0.5 if diagonal else None,
        "hadamard": hadamard,
        "left": hartley_matrix(A).float() if A else None,
        "right": torch.linalg.qr(torch.randn(B, B))[0].contiguous() if B else None,
    }


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transform_matches_the_specification(isa, shape, dtype) -> None:
    x = torch.randn(3, shape[0]).to(dtype)
    options = arguments(shape)
    want = reference.transform(x, **options)
    got = ops.transform(x, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_isa_equals_ref_bitwise(isa, shape, bits) -> None:
    x = torch.randn(5, shape[0])
    options = {**arguments(shape), "clip": 0.93}
    with force_isa("ref"):
        want = ops.transform_quantize(x, bits, **options)
    got = ops.transform_quantize(x, bits, **options)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group", [0, 32])
def test_rounding_matches_the_specification(isa, bits, group) -> None:
    x = torch.randn(9, 96) * torch.exp(torch.randn(9, 1) * 4)
    got = ops.transform_quantize(x, bits, clip=0.8, sum_group=group)
    for one, other in zip(got, reference.quantize(x, bits, 0.8, group), strict=True):
        assert torch.equal(one, other)


def test_rotation_keeps_the_norm(isa) -> None:
    for shape in SHAPES.values():
        x = torch.randn(2, shape[0])
        y = ops.transform(x, **arguments(shape, diagonal=False))
        torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-5, atol=0)


def test_hadamard_twice_is_identity(isa) -> None:
    x = torch.randn(4, 512)
    y = ops.transform(ops.transform(x, hadamard=256), hadamard=256)
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_a_power_of_two_scales_the_scale_and_nothing_else(isa) -> None:
    x = torch.randn(4, 192)
    codes, scale, sums = ops.transform_quantize(x, 4, hadamard=64)
    bigger = ops.transform_quantize(x * 32, 4, hadamard=64)
    assert torch.equal(bigger[0], codes)
    assert torch.equal(bigger[1], scale * 32)
    assert torch.equal(bigger[2], sums)


def test_tokens_do_not_see_one_another(isa) -> None:
    x = torch.randn(64, 128)
    order = torch.randperm(64)
    for one, other in zip(
        ops.transform_quantize(x, 4, hadamard=128),
        ops.transform_quantize(x[order], 4, hadamard=128),
        strict=True,
    ):
        assert torch.equal(one[order], other)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=70),
    bits=st.sampled_from([3, 4, 8]),
    clip=st.floats(0.05, 1.0),
)
def test_codes_are_nearest_and_in_range(values, bits, clip) -> None:
    x = torch.tensor([values])
    codes, scale, sums = ops.transform_quantize(x, bits, clip=clip)
    Q = 2 ** (bits - 1) - 1
    assert int(codes.abs().max()) <= Q
    assert int(sums) == int(codes.int().sum())
    if scale > 0:
        exact = (x.double() / scale.double()).clamp(-Q, Q)
        assert float((codes.double() - exact).abs().max()) <= 0.5 + 1e-4 * Q


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_token_is_marked_and_alone(isa, value) -> None:
    x = torch.randn(3, 128)
    clean = ops.transform_quantize(x, 4, hadamard=64)
    x[1, 77] = value
    codes, scale, sums = ops.transform_quantize(x, 4, hadamard=64)
    assert scale[1].isnan()
    assert not codes[1].any()
    assert not sums[1].any()
    assert torch.equal(codes[[0, 2]], clean[0][[0, 2]])


def test_zero_and_vanishing_tokens_have_scale_zero(isa) -> None:
    x = torch.zeros(2, 64)
    x[1] = 1e-40
    codes, scale, _ = ops.transform_quantize(x, 8)
    assert not codes.any()
    assert not scale.any()


def test_no_tokens_give_no_codes(isa) -> None:
    codes, scale, sums = ops.transform_quantize(torch.empty(0, 64), 4, sum_group=32)
    assert codes.shape == (0, 64)
    assert scale.shape == (0,)
    assert sums.shape == (0, 2)


def test_strides_and_leading_dimensions_do_not_matter(isa) -> None:
    x = torch.randn(64, 6).T  # [6, 64], not contiguous
    flat = ops.transform_quantize(x.contiguous(), 4, sum_group=32)
    nested = ops.transform_quantize(x.reshape(2, 3, 64), 4, sum_group=32)
    assert torch.equal(ops.transform_quantize(x, 4)[0], flat[0])
    assert nested[0].shape == (2, 3, 64)
    assert nested[1].shape == (2, 3)
    assert nested[2].shape == (2, 3, 2)
    assert torch.equal(nested[2].reshape(6, 2), flat[2])


def test_many_threads_give_what_one_gives() -> None:
    x = torch.randn(700, 256)
    threads = torch.get_num_threads()
    want = ops.transform_quantize(x, 4, hadamard=256)
    torch.set_num_threads(1)
    try:
        got = ops.transform_quantize(x, 4, hadamard=256)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got[0], want[0])


def test_gradients_match_finite_differences() -> None:
    x = torch.randn(2, 48, requires_grad=True)
    diag = (torch.rand(48) + 0.5).requires_grad_()
    left = hartley_matrix(3).float()
    weight = torch.randn(2, 48)
    (ops.transform(x, diag=diag, hadamard=16, left=left) * weight).sum().backward()
    x64 = x.detach().double().requires_grad_()
    diag64 = diag.detach().double().requires_grad_()
    (reference.transform(x64, diag64, 16, left) * weight).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(diag.grad.double(), diag64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad) -> None:
    x = torch.randn(3, 64)
    options = {"diag": torch.rand(64), "hadamard": 32, "sum_group": 32}
    torch.library.opcheck(torch.ops.saltire.transform_quantize.default, (x, 4), options)
    inputs = (x.requires_grad_(grad), torch.rand(64, requires_grad=grad), 32, None, None)
    torch.library.opcheck(torch.ops.saltire.transform.default, inputs)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(2, 64, dtype=torch.float64), {}, "expected float32, bfloat16 or float16"),
        (torch.zeros(2, 64), {"bits": 5}, "bits = 5; expected 3, 4 or 8"),
        (torch.zeros(2, 64), {"hadamard": 24}, "power of two that divides K = 64"),
        (torch.zeros(2, 64), {"hadamard": 128}, "power of two that divides K = 64"),
        (torch.zeros(2, 64), {"diag": torch.zeros(63)}, "expected dimension 0 to be 64"),
        (torch.zeros(2, 64), {"diag": torch.zeros(64).double()}, "expected float32"),
        (torch.zeros(2, 64), {"right": torch.zeros(48, 48)}, "dividing K = 64"),
        (torch.zeros(2, 64), {"right": torch.eye(64), "hadamard": 64}, "Leave one out"),
        (
            torch.zeros(2, 64),
            {"left": torch.eye(4), "hadamard": 32},
            "expected dimension 0 to be 2",
        ),
        (torch.zeros(2, 64), {"clip": 0.0}, "expected a ratio"),
        (torch.zeros(2, 64), {"sum_group": 48}, "expected a divisor of K = 64"),
        (torch.zeros(2, 0), {}, "expected K >= 1"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected(x, options, message) -> None:
    bits = options.pop("bits", 4) if "bits" in options else 4
    with pytest.raises(SaltireError, match=message):
        ops.transform_quantize(x, bits, **options)


@pytest.mark.slow
def test_offsets_do_not_wrap_beyond_two_to_the_31_elements() -> None:
    """Needs about 9 GB: 2**31 + 64 Ki values in bf16 and their codes."""
    K, M = 4096, 2**19 + 16
    assert M * K > 2**31
    x = torch.empty(M, K, dtype=torch.bfloat16)
    x[:] = torch.randn(K).bfloat16()
    x[-8:] = torch.randn(8, K).bfloat16()
    got = ops.transform_quantize(x, 8, hadamard=64)
    want = ops.transform_quantize(x[-8:].clone(), 8, hadamard=64)
    for whole, end in zip(got, want, strict=True):
        assert torch.equal(whole[-8:], end)
