"""token_stats on a device against the CPU's ops and their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saltire import ops
from saltire.errors import SaltireError
from saltire.rl.policy import head_stats

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

NAMES = ("logprob", "entropy", "logsumexp")


def compare(got: ops.TokenStats, want: ops.TokenStats, tolerance: float) -> None:
    for name in NAMES:
        one, other = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(one.cpu(), other, rtol=tolerance, atol=tolerance)
    assert torch.equal(got.argmax.cpu(), want.argmax)


def gradients(stats: ops.TokenStats, weights: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    total = sum(
        (getattr(stats, n) * w.to(stats.entropy.device)).sum()
        for n, w in zip(NAMES, weights, strict=True)
    )
    return list(torch.autograd.grad(total, inputs))


def on_device(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().cuda().requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("V", [1, 333, 50_257, 151_936])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_logits(V, dtype, softcap) -> None:
    x = (torch.randn(9, V) * 4).to(dtype)
    x[:, 1:][torch.rand(9, V - 1) < 0.2] = -torch.inf
    x.requires_grad_()
    labels = torch.zeros(9, dtype=torch.int64)
    labels[3] = -100
    options = {"softcap": softcap, "temperature": torch.rand(9) + 0.5}
    want = ops.token_stats(x, labels, **options)
    (own,) = on_device([x])
    options["temperature"] = options["temperature"].cuda()
    got = ops.token_stats(own, labels.cuda(), **options)
    compare(got, want, 1e-5)
    weights = torch.randn(3, 9)
    (expected,), (found,) = gradients(want, weights, [x]), gradients(got, weights, [own])
    step = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(found.cpu(), expected, rtol=step, atol=3e-6)


@pytest.mark.parametrize(
    ("hidden_dtype", "head_dtype", "bound"),
    [
        (torch.bfloat16, torch.bfloat16, 8e-3),
        (torch.float32, torch.float32, 1e-5),
        (torch.float16, torch.float32, 1e-3),
    ],
)
@pytest.mark.parametrize("shape", [(1, 64, 100), (33, 576, 4001), (300, 1024, 9000)])
def test_linear_form(shape, hidden_dtype, head_dtype, bound) -> None:
    M, D, V = shape
    hidden = torch.randn(M, D).to(hidden_dtype).requires_grad_()
    head = (torch.randn(V, D) / D**0.5 * 2).to(head_dtype).requires_grad_()
    bias, labels = torch.randn(V, requires_grad=True), torch.randint(0, V, (M,))
    want = ops.linear_token_stats(hidden, head, labels, bias=bias, temperature=0.8)
    own = on_device([hidden, head, bias])
    got = ops.linear_token_stats(own[0], own[1], labels.cuda(), bias=own[2], temperature=0.8)
    compare(got, want, 2e-5)
    weights = torch.randn(3, M)
    expected = gradients(want, weights, [hidden, head, bias])
    for one, other in zip(gradients(got, weights, own), expected, strict=True):
        assert one.dtype == other.dtype
        assert (one.cpu().float() - other.float()).norm() < bound * other.float().norm()


def test_results_are_the_same_every_time() -> None:
    hidden = torch.randn(200, 256, device="cuda").bfloat16().requires_grad_()
    head = torch.randn(3000, 256, device="cuda").bfloat16().requires_grad_()
    bias = torch.randn(3000, device="cuda", requires_grad=True)

    def once() -> list[Tensor]:
        stats = ops.linear_token_stats(hidden, head, bias=bias)
        grads = torch.autograd.grad(stats.entropy.sum(), [hidden, head, bias])
        return [stats.entropy.detach(), *grads]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))


def test_the_logits_are_never_held() -> None:
    """A head of 131,072: logits of these tokens would take 1 GB in bf16; at most 160 MB are."""
    hidden = torch.randn(4096, 256, device="cuda").bfloat16().requires_grad_()
    head = torch.randn(131_072, 256, device="cuda").bfloat16()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_token_stats(hidden, head).entropy.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 160e6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_policys_statistics_are_the_cpus(dtype) -> None:
    """The fused op in bf16, torch's operations in f32."""
    head, hidden = torch.nn.Linear(256, 3000).to(dtype), torch.randn(50, 256).to(dtype)
    labels = torch.randint(0, 3000, (50,))
    want = head_stats(hidden, head, labels, temperature=0.7)
    got = head_stats(hidden.cuda(), head.cuda(), labels.cuda(), temperature=0.7)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-3)


def test_bad_tokens_and_labels_are_named() -> None:
    x = torch.zeros(3, 40, device="cuda")
    with pytest.raises(SaltireError, match=r"labels\[2\] is 40, outside the vocabulary of 40"):
        ops.token_stats(x, torch.tensor([0, 1, 40], device="cuda"))
    x[1, 3] = torch.nan
    with pytest.raises(SaltireError, match="token 1"):
        ops.token_stats(x)


def test_captured_in_a_graph() -> None:
    x = torch.randn(4, 5000, device="cuda").bfloat16()
    want = ops.token_stats(x).entropy
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ops.token_stats(x, check=False).entropy
    got.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
