"""QuantLinear: what it computes, what it stores, what it shares."""

from __future__ import annotations

import copy

import pytest
import torch

from saltire import ops
from saltire.errors import SaltireError
from saltire.nn.linear_format import LinearFormat
from saltire.nn.quant_linear import QuantLinear, SharedInput
from saltire.reference.transform_quantize import transform_quantize

FORMATS = {
    "per channel": LinearFormat(4, 4, hadamard=32, diag=True),
    "groups, zero points": LinearFormat(4, 8, group=32, zero_points=True, scale_dtype="float16"),
    "two bits, groups": LinearFormat(2, 4, group=64, scale_dtype="float16", hadamard=64),
    "eight bits": LinearFormat(8, 8, diag=True, hadamard=32),
    "three bits, both factors": LinearFormat(3, 3, left=6, right=32, clip=0.9),
    "left and Hadamard": LinearFormat(4, 4, left=3, hadamard=64, diag=True),
    "low rank": LinearFormat(4, 4, rank=5),
}


def random_layer(format: LinearFormat, K: int = 192, N: int = 40, bias: bool = True) -> QuantLinear:
    layer = QuantLinear(K, N, format, bias=bias)
    codes = torch.randint(0, 2**format.weight_bits, (N, K), dtype=torch.uint8)
    layer.weight_packed = ops.pack_weight(codes, format.weight_bits)
    layer.weight_scale = (torch.rand(layer.weight_scale.shape) / 50 + 0.01).to(
        layer.weight_scale.dtype
    )
    for name in ("weight_zero", "diag", "left", "right", "low_rank_in", "low_rank_out", "bias"):
        buffer = getattr(layer, name)
        if buffer is not None:
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    return layer


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.parametrize("M", [1, 7], ids=["decode", "several tokens"])
def test_forward_is_quantised_input_times_dequantised_weight(format, M) -> None:
    layer = random_layer(format)
    x = torch.randn(M, 192)
    codes, scale, _ = transform_quantize(
        x, format.act_bits, layer.diag, format.hadamard, layer.left, layer.right, format.clip
    )
    want = (codes.double() * scale.double()[:, None]) @ layer.dequantized_weight().T
    if layer.low_rank_in is not None and layer.low_rank_out is not None:
        want += x.double() @ layer.low_rank_in.double() @ layer.low_rank_out.double()
    want += layer.bias.double()
    # f32 transforms may round a tie to the other code: allow a few codes of difference.
    torch.testing.assert_close(layer(x).double(), want, rtol=0.02, atol=0.02 * want.abs().max())


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())
def test_state_dict_is_the_same_before_and_after_the_first_forward(format) -> None:
    layer = random_layer(format)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(3, 192))
    assert layer.weight_packed.numel() == 0, "the weights are kept twice"
    after = layer.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_state_dict_loads_into_a_layer_that_has_run() -> None:
    format = FORMATS["groups, zero points"]
    one, other = random_layer(format), random_layer(format)
    x = torch.randn(2, 192)
    other(x)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_changing_the_model_dtype_changes_no_result() -> None:
    layer = random_layer(FORMATS["left and Hadamard"])
    x = torch.randn(2, 192)
    before = layer(x)
    layer.to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.float32 or layer.weight_scale.numel() == 0
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_dtype_and_the_leading_shape_of_the_input(dtype) -> None:
    layer = random_layer(FORMATS["per channel"])
    y = layer(torch.randn(2, 3, 192, dtype=dtype))
    assert y.dtype == dtype
    assert y.shape == (2, 3, 40)


def test_a_copy_computes_the_same() -> None:
    layer = random_layer(FORMATS["per channel"])
    x = torch.randn(2, 192)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)


def test_nan_in_one_token_marks_that_token_only() -> None:
    layer = random_layer(FORMATS["per channel"])
    x = torch.randn(3, 192)
    clean = layer(x)
    x[1, 5] = float("nan")
    y = layer(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


def test_shared_input_is_computed_once_for_the_same_tensor_only() -> None:
    calls = []

    def compute(x: torch.Tensor):
        calls.append(x)
        return x, x, x

    shared = SharedInput()
    x = torch.randn(2, 4)
    shared.get(x, compute)
    shared.get(x, compute)
    assert len(calls) == 1
    x += 1  # the same object with other values
    shared.get(x, compute)
    assert len(calls) == 2
    shared.get(x.clone(), compute)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_bits": 5}, "weight_bits = 5; expected one of"),
        ({"act_bits": 2}, "act_bits = 2"),
        ({"group": 48}, "group = 48"),
        ({"hadamard": 48}, "power of two"),
        ({"clip": 0.0}, "clip"),
        ({"rank": -1}, "negative"),
    ],
)
def test_an_impossible_format_is_refused(values, message) -> None:
    with pytest.raises(SaltireError, match=message):
        LinearFormat(**values)


@pytest.mark.parametrize(
    ("format", "K", "message"),
    [
        (LinearFormat(), 40, "multiple of 32"),
        (LinearFormat(group=128), 192, "group blocks of 128.* choose 32 or 64"),
        (LinearFormat(hadamard=128), 192, "hadamard blocks of 128"),
        (LinearFormat(left=5, hadamard=32), 192, "left"),
    ],
)
def test_a_format_that_does_not_fit_the_layer_is_refused(format, K, message) -> None:
    with pytest.raises(SaltireError, match=message):
        QuantLinear(K, 8, format)


def test_a_format_survives_its_dict_and_refuses_unknown_fields() -> None:
    format = FORMATS["three bits, both factors"]
    assert LinearFormat.from_dict(format.to_dict()) == format
    with pytest.raises(SaltireError, match="unknown fields"):
        LinearFormat.from_dict({**format.to_dict(), "codebook": 3})
