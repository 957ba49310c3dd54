"""lowbit_gemm on a device against the specification, by every kernel that the device has.

Scales that are powers of two make every float of the formula exact: results equal the reference to
the bit. Random scales get a tolerance.
"""

from __future__ import annotations

import pytest
import torch

from saltire import ops, reference
from saltire.errors import SaltireError
from saltire.nn.linear_format import LinearFormat
from saltire.nn.quant_linear import QuantLinear

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

# M: dp4a, mma of each width, tiles of a prefill with a ragged end.
TOKENS = [1, 2, 3, 4, 5, 16, 31, 64, 65, 500, 2048]
FORMATS = [  # bits, group, act_bits, zero points
    (4, 0, 4, False), (4, 128, 4, False), (4, 128, 8, True), (4, 64, 8, False), (4, 32, 4, False),
    (3, 128, 4, False), (2, 64, 4, False), (2, 32, 8, True), (2, 0, 8, False), (4, 0, 8, True),
    (8, 0, 8, False), (8, 128, 4, False), (8, 64, 8, True),
]  # fmt: skip


class Problem:
    def __init__(self, M, N, K, bits, group, act_bits, zero, table, exact) -> None:
        groups = K // (group or K)
        powers = torch.tensor([0.25, 0.5, 1.0, 2.0])
        self.bits, self.group, self.act_bits, self.N = bits, group, act_bits, N
        self.codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8)
        self.packed = ops.pack_weight(self.codes, bits)
        scale = powers[torch.randint(4, (N, groups))] if exact else torch.rand(N, groups) + 0.1
        self.scale = scale.to(table)
        self.zero = torch.randint(0, 2**bits, (N, groups)).to(table) if zero else None
        Q = 2 ** (act_bits - 1) - 1
        self.x = torch.randint(-Q, Q + 1, (M, K), dtype=torch.int8)
        self.x_sum = self.x.reshape(M, groups, -1).int().sum(-1, dtype=torch.int32)
        self.x_scale = powers[torch.randint(4, (M,))] if exact else torch.rand(M) + 0.1

    def prepacked(self) -> torch.Tensor:
        zero = None if self.zero is None else self.zero.cuda()
        return ops.prepack_weight(
            self.packed.cuda(), self.scale.cuda(), zero, self.bits, self.group
        )

    def on_device(self, **options) -> torch.Tensor:
        tokens = (self.x.cuda(), self.x_scale.cuda(), self.x_sum.cuda())
        options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        return ops.lowbit_gemm(
            *tokens, self.prepacked(), self.N, self.bits, self.group, act_bits=self.act_bits,
            **options,
        ).cpu()  # fmt: skip

    def reference(self, **options) -> torch.Tensor:
        return reference.lowbit_gemm.lowbit_gemm(
            self.x, self.x_scale, self.x_sum, self.packed, self.scale, self.zero, self.bits,
            self.group, **options,
        )  # fmt: skip


@pytest.mark.parametrize("M", TOKENS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_exact_scales_equal_the_reference(M, format) -> None:
    p = Problem(M, 712, 640, *format, torch.float16 if M % 2 else torch.float32, exact=True)
    assert torch.equal(p.on_device().double(), p.reference())


@pytest.mark.parametrize("M", [1, 24, 300])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_branch_bias_and_dtypes(M, out) -> None:
    p = Problem(M, 456, 1024, 4, 128, 4, False, torch.float16, exact=False)
    options = {
        "bias": torch.randn(456),
        "low_rank_x": torch.randn(M, 24),
        "low_rank_w": torch.randn(24, 456),
    }
    want, got = p.reference(**options), p.on_device(out_dtype=out, **options)
    assert got.dtype == out
    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[out]
    assert (got.double() - want).norm() / want.norm() < bound


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("table", [torch.float32, torch.float16])
def test_unprepack_undoes_prepack(format, table) -> None:
    p = Problem(1, 200, 640, *format, table, exact=False)
    packed, scale, zero = ops.unprepack_weight(
        p.prepacked(), 200, 640, p.bits, p.group, p.zero is not None, table
    )
    assert torch.equal(packed.cpu(), p.packed)
    assert torch.equal(scale.cpu(), p.scale)
    assert p.zero is None or (zero is not None and torch.equal(zero.cpu(), p.zero))


def test_a_weight_of_the_cpu_is_refused() -> None:
    p = Problem(1, 64, 128, 4, 0, 4, False, torch.float32, exact=True)
    w = ops.prepack_weight(p.packed, p.scale, None, 4).cuda()
    with pytest.raises(SaltireError, match="Prepack it there"):
        ops.lowbit_gemm(p.x.cuda(), p.x_scale.cuda(), p.x_sum.cuda(), w, 64, 4)


def test_results_are_the_same_every_time() -> None:
    p = Problem(9, 192, 8192, 4, 128, 4, False, torch.float16, exact=False)
    first = p.on_device()
    assert all(torch.equal(p.on_device(), first) for _ in range(5))


@pytest.mark.parametrize("M", [1, 7, 200])
def test_quant_linear_runs_on_the_device_and_comes_back(M) -> None:
    format = LinearFormat(4, 8, 64, scale_dtype="float16", diag=True, hadamard=64, rank=8)
    linear = QuantLinear(576, 200, format, bias=True)
    linear.weight_packed.random_(0, 256)
    linear.weight_scale.uniform_(0.01, 0.1)
    for buffer in (linear.diag, linear.low_rank_in, linear.low_rank_out, linear.bias):
        buffer.normal_()
    saved = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    x = torch.randn(M, 576)
    want = linear(x)
    got = linear.cuda()(x.cuda())
    assert (got.cpu() - want).norm() / want.norm() < 1e-5
    for name, tensor in linear.state_dict().items():
        assert torch.equal(tensor.cpu(), saved[name]), name
    assert torch.equal(linear.cpu()(x), want)


def test_captured_in_a_graph() -> None:
    p = Problem(9, 192, 4096, 4, 128, 4, False, torch.float16, exact=False)
    w = p.prepacked()
    tokens = (p.x.cuda(), p.x_scale.cuda(), p.x_sum.cuda())

    def call() -> torch.Tensor:
        return ops.lowbit_gemm(*tokens, w, p.N, p.bits, p.group, act_bits=p.act_bits)

    want = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    got.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
