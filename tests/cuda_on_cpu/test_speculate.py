"""speculate's CUDA kernels on the emulator: distributions against the specification, draws and
acceptance against the CPU's ops, whose random numbers they share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from saltire import ops
from saltire.reference import speculate as reference
from tests.cuda_on_cpu.emulate import build, run


@pytest.fixture(scope="module")
def program() -> Path:
    return build("speculate")


def warp(program: Path, logits: Tensor, t=1.0, k=0, p=1.0, m=0.0, seed=0, **device):
    return run(
        program, seed, {"p": (torch.float32, tuple(logits.shape))}, what="warp", logits=logits,
        M=logits.shape[0], V=logits.shape[1], temperature=t, top_k=k, top_p=p, min_p=m, **device,
    )  # fmt: skip


SETTINGS = {
    "plain": (1.0, 0, 1.0, 0.0),
    "top-k": (0.7, 20, 1.0, 0.0),
    "top-p": (1.3, 0, 0.9, 0.0),
    "all": (0.8, 50, 0.95, 0.05),
}


# V: fewer than a warp's; off every width; more than four values a thread.
@pytest.mark.parametrize("V", [1, 5, 1000, 5003])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_warped_distributions_equal_the_reference(program, V, settings) -> None:
    logits = torch.randn(1 if V > 1000 else 2, V) * 3
    logits[0, 1:][torch.rand(V - 1) < 0.3] = -torch.inf
    got = warp(program, logits, *settings, seed=V)
    assert "shared" in got["plan"]
    want = reference.warp_logits(logits, *settings)
    torch.testing.assert_close(got["p"], want, atol=1e-6, rtol=1e-4)
    assert torch.equal(got["p"] > 0, want > 0)


def test_a_row_that_does_not_fit_into_shared_memory(program) -> None:
    logits = torch.randn(1, 2000) * 3
    got = warp(program, logits, *SETTINGS["all"], shared_bytes=4096)
    assert "global" in got["plan"]
    want = reference.warp_logits(logits, *SETTINGS["all"])
    torch.testing.assert_close(got["p"], want, atol=1e-6, rtol=1e-4)


def test_ties(program) -> None:
    """Ties with the k-th stay; of equals at top-p's edge, those with the lower index."""
    logits = torch.zeros(1, 300)
    logits[0, [7, 150, 299]] = 2.0
    assert int((warp(program, logits, k=2)["p"] > 0).sum()) == 3
    assert int((warp(program, logits, k=4)["p"] > 0).sum()) == 300
    share = 3 * 2.718281828**2 / (297 + 3 * 2.718281828**2)
    kept = warp(program, logits, p=share * 0.5)["p"][0].nonzero().flatten()
    assert kept.tolist() == [7, 150]
    kept = warp(program, logits, p=share + 1.5 / 320)["p"][0].nonzero().flatten()
    assert kept.tolist() == [0, 1, 7, 150, 299]
    # The same among the few that top-k leaves.
    kept = warp(program, logits, k=4, p=share + 1.5 / 320)["p"][0].nonzero().flatten()
    assert kept.tolist() == [0, 1, 7, 150, 299]
    kept = warp(program, logits, k=3, p=0.5)["p"][0].nonzero().flatten()
    assert kept.tolist() == [7, 150]


def test_rows_without_a_token_are_nan(program) -> None:
    logits = torch.randn(5, 200)
    logits[1], logits[2, 77], logits[3, 199] = -torch.inf, torch.nan, torch.inf
    assert warp(program, logits, k=5)["p"].isnan().all(1).tolist() == [0, 1, 1, 1, 0]


def draw(program: Path, p: Tensor, seed: int, draft: bool = False) -> Tensor:
    M, V = p.shape
    return run(
        program, seed, {"tokens": (torch.int64, (M,))}, what="draw", p=p, M=M, V=V, key=seed,
        sequences=torch.arange(M), positions=torch.arange(M) * 3, draft=float(draft),
    )["tokens"]  # fmt: skip


# V: one token; a range without values for most warps; ranges that are not whole.
@pytest.mark.parametrize("V", [1, 40, 1000, 5003])
@pytest.mark.parametrize("draft", [False, True])
def test_draws_are_the_cpus(program, V, draft) -> None:
    p = ops.warp_logits(torch.randn(6, V) * 2, top_p=0.9)
    p[1] = 0.0
    p[1, V // 2] = 1.0  # all mass in one place
    want = ops.draw_tokens(p, torch.arange(6), torch.arange(6) * 3, V, draft)
    assert torch.equal(draw(program, p, V, draft), want)


def test_a_row_without_mass_draws_the_first_token_as_on_the_cpu(program) -> None:
    assert draw(program, torch.zeros(1, 70), 3).tolist() == [0]


def verify(program: Path, p, q, drafts, counts, positions, seed=5):
    B, V = counts.numel(), p.shape[1]
    out = {"accepted": (torch.int64, (B,)), "next": (torch.int64, (B,))}
    got = run(
        program, seed, out, what="verify", p=p, q=q, drafts=drafts, counts=counts, B=B,
        S=drafts.numel(), V=V, sequences=torch.arange(B) + 2, positions=positions, key=seed,
    )  # fmt: skip
    return got["accepted"], got["next"]


@pytest.mark.parametrize("certain", [False, True], ids=["drawn", "certain"])
@pytest.mark.parametrize("V", [7, 600])
def test_acceptance_is_the_cpus(program, V, certain) -> None:
    for seed in range(2):
        counts = torch.tensor([3, 0, 1, 6])
        S, B = int(counts.sum()), 4
        p = ops.warp_logits(torch.randn(S + B, V))
        q = ops.warp_logits(torch.randn(S, V) * 0.5)
        rows = torch.arange(S) + torch.arange(B).repeat_interleave(counts)
        drafts = p[rows].argmax(-1) if certain else ops.draw_tokens(
            q, torch.arange(S), torch.arange(S), seed, True
        )  # fmt: skip
        positions = torch.tensor([10, 0, 5, 77])
        given = (p, None if certain else q, drafts, counts)
        got = verify(program, *given, positions, seed)
        want = ops.speculate_verify(*given, torch.arange(B) + 2, positions, seed)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


def test_counts_and_drafts_out_of_range_are_marked(program) -> None:
    p, zero = torch.full((5, 4), 0.25), torch.zeros(2, dtype=torch.int64)
    ones = torch.tensor([1, 2, 3])
    for counts, drafts, bad in (
        ([2, 1], ones, [False, False]),
        ([-1, 4], ones, [True, True]),
        ([2, 2], ones, [False, True]),
        ([1, 1], ones, [False, True]),
        ([2, 1], torch.tensor([1, 4, 3]), [True, False]),
        ([2, 1], torch.tensor([1, 3, -1]), [False, True]),
    ):
        accepted, following = verify(program, p, None, drafts, torch.tensor(counts), zero)
        assert (accepted < 0).tolist() == bad
        assert (following < 0).tolist() == bad


def test_plans(program) -> None:
    def plan(V: int, **device: int) -> str:
        return run(
            program, what="warp", M=1, V=V, temperature=1, top_k=0, top_p=1, min_p=0, **device
        )["plan"]

    assert plan(49_152).startswith("threads=1024 shared")
    assert plan(151_936).startswith("threads=1024 global")
    assert plan(49_152, sm=86, shared_bytes=99 * 1024).startswith("threads=1024 global")
