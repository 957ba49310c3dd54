"""speculate on a device against the CPU's ops: the same draws from the same distributions."""

from __future__ import annotations

import pytest
import torch

from saltire import ops
from saltire.errors import SaltireError

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("V", [1, 5003, 49_152, 151_936])
@pytest.mark.parametrize(
    "settings", [(1.0, 0, 1.0, 0.0), (0.7, 20, 1.0, 0.0), (1.3, 0, 0.9, 0.0), (0.8, 50, 0.95, 0.05)]
)
def test_warped_distributions(V, settings) -> None:
    logits = torch.randn(5, V) * 3
    got = ops.warp_logits(logits.cuda(), *settings)
    torch.testing.assert_close(got.cpu(), ops.warp_logits(logits, *settings), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("V", [40, 49_152, 151_936])
def test_draws_are_the_cpus(V) -> None:
    p = ops.warp_logits(torch.randn(300, V) * 2, top_p=0.9)
    sequences, positions = torch.arange(300) // 7, torch.arange(300) % 7
    got = ops.draw_tokens(p.cuda(), sequences.cuda(), positions.cuda(), 11)
    assert torch.equal(got.cpu(), ops.draw_tokens(p, sequences, positions, 11))


@pytest.mark.parametrize("certain", [False, True])
def test_acceptance_is_the_cpus(certain) -> None:
    counts = torch.tensor([3, 0, 1, 6, 8])
    S, B, V = int(counts.sum()), counts.numel(), 4000
    for seed in range(20):
        p, q = ops.warp_logits(torch.randn(S + B, V)), ops.warp_logits(torch.randn(S, V))
        index = torch.arange(S)
        drafts = ops.draw_tokens(q, index, index, seed, draft=True)
        given = [p, None if certain else q, drafts, counts, torch.arange(B), torch.arange(B) * 9]
        want = ops.speculate_verify(*given, seed)
        on_device = [None if t is None else t.cuda() for t in given]
        for one, other in zip(ops.speculate_verify(*on_device, seed), want, strict=True):
            assert torch.equal(one.cpu(), other)


def test_bad_input_is_named() -> None:
    logits = torch.randn(3, 100, device="cuda")
    logits[1, 7] = torch.nan
    with pytest.raises(SaltireError, match="row 1 of logits"):
        ops.warp_logits(logits)
    p, zero = torch.full((3, 4), 0.25, device="cuda"), torch.zeros(1, dtype=torch.int64).cuda()
    for drafts, counts, message in (
        ([1, 9], [2], "token 9; the target's vocabulary has 4"),
        ([1, 2], [1], "counts make 1, but there are 2"),
        ([1, 2], [-1], "counts holds -1"),
    ):
        given = [torch.tensor(values, device="cuda") for values in (drafts, counts)]
        with pytest.raises(SaltireError, match=message):
            ops.speculate_verify(p, None, *given, zero, zero, 0)


def test_captured_in_a_graph() -> None:
    logits = torch.randn(2, 5000, device="cuda")
    index = torch.arange(2, device="cuda")

    def call() -> torch.Tensor:
        return ops.draw_tokens(ops.warp_logits(logits, 0.8, 50, 0.9), index, index, 3)

    want = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    got.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)
