"""The layouts of low-bit weights: each is exact, undoes itself and refuses what does not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.ops.lowbit_gemm import (
    pack_weight,
    prepack_weight,
    unpack_weight,
    unprepack_weight,
)
from saltire.reference import lowbit_gemm as reference

BITS = st.sampled_from([2, 3, 4, 8])


def random_codes(seed: int, N: int, K: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, generator=generator)


@given(seed=st.integers(0, 2**31), N=st.integers(0, 40), quads=st.integers(1, 30), bits=BITS)
def test_pack_then_unpack_is_identity(seed: int, N: int, quads: int, bits: int) -> None:
    codes = random_codes(seed, N, 4 * quads, bits)
    assert torch.equal(unpack_weight(pack_weight(codes, bits), bits), codes)


@given(seed=st.integers(0, 2**31), N=st.integers(1, 40), quads=st.integers(1, 30), bits=BITS)
def test_packed_bytes_equal_the_specification(seed: int, N: int, quads: int, bits: int) -> None:
    codes = random_codes(seed, N, 4 * quads, bits)
    assert torch.equal(pack_weight(codes, bits), reference.pack_weight(codes, bits))


def test_worked_bytes_of_the_checkpoint_layout() -> None:
    """The two bytes that csrc/core/formats.h works out."""
    assert pack_weight(torch.tensor([[9, 3]], dtype=torch.uint8), 4).item() == 0x39
    assert pack_weight(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).item() == 0b00111001


def test_worked_byte_of_the_prepacked_layout() -> None:
    """The byte that csrc/lowbit_gemm/op.h works out."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[1, 1], codes[1, 5] = 9, 3
    w = prepack_weight(pack_weight(codes, 4), torch.ones(32, 1), None, 4)
    assert w[64 + 5].item() == 0x39
    assert w[64 : 64 + 32 * 16].count_nonzero() == 1
    # 8 bits: a step of four inputs, so input 5 is the next step's byte of i = 1.
    w = prepack_weight(pack_weight(codes, 8), torch.ones(32, 1), None, 8)
    assert (w[64 + 5].item(), w[64 + 128 + 5].item()) == (9, 3)
    assert w[64 : 64 + 32 * 32].count_nonzero() == 2


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 100),
    groups=st.integers(1, 4),
    group=st.sampled_from([0, 32, 64, 96, 128]),
    bits=BITS,
    has_zero=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_prepack_then_unprepack_is_identity(
    seed: int,
    N: int,
    groups: int,
    group: int,
    bits: int,
    has_zero: bool,
    dtype: torch.dtype,
) -> None:
    """Bit for bit: tables hold any bit pattern, NaNs with payloads among them."""
    K = groups * (group or 32)
    generator = torch.Generator().manual_seed(seed)
    packed = pack_weight(random_codes(seed, N, K, bits), bits)
    word = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(word)
    tables = torch.randint(
        limits.min, limits.max, (2, N, K // (group or K)), dtype=word, generator=generator
    ).view(dtype)
    zero = tables[1] if has_zero else None
    w = prepack_weight(packed, tables[0], zero, bits, group)
    back, scale_back, zero_back = unprepack_weight(w, N, K, bits, group, has_zero, dtype)
    assert torch.equal(back, packed)
    assert torch.equal(scale_back.view(word), tables[0].view(word))
    if has_zero:
        assert zero_back is not None
        assert torch.equal(zero_back.view(word), tables[1].view(word))
    else:
        assert zero_back is None


def test_prepacked_buffer_is_hardly_larger_than_the_weight() -> None:
    packed = torch.zeros(4096, 2048, dtype=torch.uint8)
    w = prepack_weight(packed, torch.ones(4096, 32, dtype=torch.float16), None, 4, 128)
    assert w.numel() == 64 + packed.numel() + 4096 * 32 * 2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_too_large_is_refused(bits: int) -> None:
    codes = torch.zeros(20, 8, dtype=torch.uint8)
    codes[17, 3] = 2**bits
    with pytest.raises(SaltireError, match=f"row 17 holds a code of {2**bits} or more"):
        pack_weight(codes, bits)


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.zeros(4, 8), 4, "codes is float32 \\[4, 8\\]; expected uint8"),
        (torch.zeros(8, dtype=torch.uint8), 4, "expected 2 dimensions"),
        (torch.zeros(4, 7, dtype=torch.uint8), 4, "multiple of 2"),
        (torch.zeros(4, 6, dtype=torch.uint8), 2, "multiple of 4"),
        (torch.zeros(4, 8, dtype=torch.uint8), 7, "2, 3, 4 or 8 bits"),
    ],
)
def test_codes_that_cannot_be_packed_are_refused(
    codes: torch.Tensor, bits: int, message: str
) -> None:
    with pytest.raises(SaltireError, match=message):
        pack_weight(codes, bits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": torch.zeros(8, 50, dtype=torch.uint8)}, "K = 100 is not a multiple of 32"),
        ({"packed": torch.zeros(0, 32, dtype=torch.uint8)}, "N must be at least 1"),
        ({"scale": torch.ones(8, 1)}, "expected dimension 1 to be 2 \\(K / group\\)"),
        ({"scale": torch.ones(8, 2, dtype=torch.bfloat16)}, "expected float32 or float16"),
        ({"zero": torch.ones(8, 2, dtype=torch.float16)}, "zero is float16"),
        ({"zero": torch.ones(7, 2)}, "zero is float32 \\[7, 2\\]"),
        ({"group": 16}, "group = 16"),
        ({"group": -32}, "group = -32"),
    ],
)
def test_weights_that_cannot_be_prepacked_are_refused(changes: dict, message: str) -> None:
    args = {
        "packed": torch.zeros(8, 32, dtype=torch.uint8),
        "scale": torch.ones(8, 2),
        "zero": None,
        "bits": 4,
        "group": 32,
    }
    with pytest.raises(SaltireError, match=message):
        prepack_weight(**{**args, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"has_zero": True}, "without zero points"),
        ({"scale_dtype": torch.float16}, "scales of float32"),
        ({"k": 96}, "prepacked with N = 8, K = 64"),
    ],
)
def test_unprepacking_as_something_else_is_refused(changes: dict, message: str) -> None:
    w = prepack_weight(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1), None, 4)
    args = {"n": 8, "k": 64, "bits": 4, "group": 0, "has_zero": False}
    with pytest.raises(SaltireError, match=message):
        unprepack_weight(w, **{**args, "scale_dtype": torch.float32, **changes})


@pytest.mark.slow
def test_more_than_two_to_the_31_codes_pack_and_unpack() -> None:
    """2.2e9 codes: indices need 64 bits."""
    N, K = 2**15 + 2048, 2**16
    codes = torch.zeros(N, K, dtype=torch.uint8)
    codes[-1] = random_codes(1, 1, K, 4)[0]
    packed = pack_weight(codes, 4)
    assert torch.equal(packed[-1], reference.pack_weight(codes[-1:], 4)[0])
    del codes
    assert packed[:-1].count_nonzero() == 0
    assert torch.equal(unpack_weight(packed, 4)[-1], reference.unpack_weight(packed[-1:], 4)[0])
