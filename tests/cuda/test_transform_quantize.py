"""transform_quantize on a device: the CPU's bits."""

from __future__ import annotations

import pytest
import torch

from saltire import ops
from saltire.reference.transform_quantize import hartley_matrix

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("K", "hadamard", "left"), [(4096, 64, 0), (576, 64, 9), (8192, 8192, 0), (14336, 1024, 0)]
)
@pytest.mark.parametrize("M", [1, 37])
def test_device_equals_cpu_bitwise(M, K, hadamard, left, dtype) -> None:
    x, diag = torch.randn(M, K).to(dtype), torch.rand(K) + 0.5
    factor = hartley_matrix(left).float() if left else None
    options = {"hadamard": hadamard, "clip": 0.95, "sum_group": 32}
    want = ops.transform_quantize(x, 4, diag=diag, left=factor, **options)
    on_device = None if factor is None else factor.cuda()
    got = ops.transform_quantize(x.cuda(), 4, diag=diag.cuda(), left=on_device, **options)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.cpu(), other)


def test_transform_alone_equals_cpu_bitwise() -> None:
    x = torch.randn(5, 4096)
    got = ops.transform(x.cuda(), hadamard=128)
    assert torch.equal(got.cpu(), ops.transform(x, hadamard=128))


def test_runs_on_the_callers_stream() -> None:
    """Work before it on the same stream is seen: x is written there right before."""
    stream = torch.cuda.Stream()
    x = torch.zeros(4096, 4096, device="cuda")
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        x.fill_(1.0)
        codes, _, _ = ops.transform_quantize(x, 4)
    stream.synchronize()
    assert bool((codes == 7).all())
