"""token_stats: right near collapse and under offsets, masked, capped, tempered, in shards."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saltire import ops
from saltire.errors import SaltireError
from saltire.ops import force_isa
from saltire.ops.token_stats import _Arguments, merge_shards, top_entropy_mask
from saltire.reference import token_stats as reference

# Vocabularies: one token; inside a vector; off the vector width; over one block of 2,048.
VOCABULARIES = [1, 7, 16, 100, 2048, 5003]
# tokens, D, V: one of all; off every width; several groups of tokens, tiles and column blocks.
LINEAR_SHAPES = [(1, 1, 1), (5, 7, 30), (33, 20, 401), (150, 70, 777), (300, 96, 1000)]


def floats(stats: ops.TokenStats) -> dict[str, Tensor]:
    return {
        "logprob": stats.logprob,
        "entropy": stats.entropy,
        "logsumexp": stats.logsumexp,
        "max_prob": stats.max_prob,
    }


def check(stats: ops.TokenStats, want: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    for name, value in floats(stats).items():
        scale = max(1.0, float(want[name].detach().abs().max()))
        torch.testing.assert_close(
            value.double(), want[name], rtol=0, atol=tolerance * scale, msg=lambda m, n=name: n + m
        )
    assert torch.equal(stats.argmax, want["argmax"])


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stats_match_the_specification(isa, V, dtype) -> None:
    logits = (torch.randn(9, V) * 4).to(dtype)
    labels = torch.randint(0, V, (9,))
    check(ops.token_stats(logits, labels), reference.token_stats(logits, labels))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("V", [7, 100, 5003])
def test_masks_caps_temperatures_and_ignored_tokens_match(isa, V, softcap) -> None:
    logits = torch.randn(12, V) * 6
    logits[:, 1:][torch.rand(12, V - 1) < 0.3] = -torch.inf
    labels = torch.zeros(12, dtype=torch.int64)
    labels[3] = -100
    temperature = torch.rand(12) + 0.3
    options = {"temperature": temperature, "softcap": softcap}
    got = ops.token_stats(logits, labels, **options)
    want = reference.token_stats(logits, labels, **options)
    want["max_prob"][3] = 1.0  # e^0 of an ignored token
    want["argmax"][3] = 0
    check(got, want, 4e-6)


def gradients(stats: dict[str, Tensor], weights: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    names = ("logprob", "entropy", "logsumexp")
    total = sum(
        (stats[n] * w.to(stats[n].dtype)).sum() for n, w in zip(names, weights, strict=True)
    )
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("V", VOCABULARIES)
def test_gradient_matches_float64(isa, V, softcap) -> None:
    logits = torch.randn(8, V) * 3
    logits[:, 1:][torch.rand(8, V - 1) < 0.2] = -torch.inf
    labels = torch.zeros(8, dtype=torch.int64)
    labels[2] = -100
    options = {"temperature": torch.rand(8) + 0.5, "softcap": softcap}
    weights = torch.randn(3, 8)
    x, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
    (got,) = gradients(floats(ops.token_stats(x, labels, **options)), weights, [x])
    (want,) = gradients(reference.token_stats(exact, labels, **options), weights, [exact])
    torch.testing.assert_close(got.double(), want.nan_to_num(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_halves_is_rounded_once(isa, dtype) -> None:
    logits = torch.randn(6, 100).to(dtype)
    labels = torch.randint(0, 100, (6,))
    weights = torch.randn(3, 6)
    x, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
    (got,) = gradients(floats(ops.token_stats(x, labels)), weights, [x])
    (want,) = gradients(reference.token_stats(exact, labels), weights, [exact])
    step = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double(), want, rtol=step * 1.05, atol=1e-6)


@pytest.mark.parametrize("shape", LINEAR_SHAPES)
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_linear_matches_the_specification_and_its_gradient(isa, shape, softcap) -> None:
    M, D, V = shape
    hidden, head, bias = torch.randn(M, D), torch.randn(V, D) / D**0.5 * 2, torch.randn(V)
    labels = torch.randint(0, V, (M,))
    labels[M // 2] = -100 if M > 1 else 0
    options = {"temperature": torch.rand(M) + 0.5, "softcap": softcap}
    weights = torch.randn(3, M)
    own = [t.requires_grad_() for t in (hidden, head, bias)]
    exact = [t.detach().double().requires_grad_() for t in own]
    stats = ops.linear_token_stats(own[0], own[1], labels, bias=own[2], **options)
    want = reference.linear_token_stats(exact[0], exact[1], labels, exact[2], **options)
    if M > 1:
        want["max_prob"] = want["max_prob"].index_fill(0, torch.tensor(M // 2), 1.0)
        want["argmax"][M // 2] = 0
    check(stats, want, 5e-6)
    got = gradients(floats(stats), weights, own)
    for one, other in zip(got, gradients(want, weights, exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_takes_halves_and_mixed_kinds(isa, dtype) -> None:
    hidden, head = torch.randn(40, 24).to(dtype), torch.randn(90, 24)
    labels = torch.randint(0, 90, (40,))
    for h, w in ((hidden, head), (hidden, head.to(dtype)), (hidden.float(), head.to(dtype))):
        check(
            ops.linear_token_stats(h, w, labels), reference.linear_token_stats(h, w, labels), 5e-6
        )
        own = [h.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()]
        exact = [t.detach().double().requires_grad_() for t in own]
        weights = torch.randn(3, 40)
        got = gradients(floats(ops.linear_token_stats(*own, labels)), weights, own)
        want = gradients(reference.linear_token_stats(*exact, labels), weights, exact)
        for one, other, source in zip(got, want, own, strict=True):
            assert one.dtype == source.dtype
            torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("offset", [0.0, 30.0, 300.0, -300.0])
def test_entropy_near_collapse_keeps_its_digits(isa, offset) -> None:
    """H about 1e-4 over 20,000 tokens: where lse − Σ p·z is wrong by as much as H itself."""
    logits = torch.randn(16, 20_000)
    logits[:, 5] = 26.0
    logits += offset
    labels = torch.full((16,), 5)
    got, want = ops.token_stats(logits, labels), reference.token_stats(logits, labels)
    assert 1e-6 < float(want["entropy"].mean()) < 1e-3
    assert float((got.entropy - want["entropy"]).abs().max()) < 1e-6
    assert float((got.logprob - want["logprob"]).abs().max()) < 1e-6


def test_entropy_is_invariant_to_a_logit_shift(isa) -> None:
    logits = torch.randint(-40, 40, (8, 300)) / 8  # shifts by 64 are exact in f32
    one, other = ops.token_stats(logits), ops.token_stats(logits + 64)
    assert torch.equal(one.entropy, other.entropy)
    assert torch.equal(one.logsumexp + 64, other.logsumexp)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=70),
    temperature=st.floats(0.25, 4.0),
)
def test_entropy_is_in_range_and_probabilities_are_probabilities(values, temperature) -> None:
    logits = torch.tensor([values])
    stats = ops.token_stats(logits, torch.tensor([0]), temperature=temperature)
    assert 0 <= float(stats.entropy) <= math.log(len(values)) + 1e-6
    assert float(stats.logprob) <= 1e-6
    assert 1 / len(values) - 1e-6 <= float(stats.max_prob) <= 1
    assert logits[0, int(stats.argmax)] == logits.max()


def test_extreme_logits_stay_finite(isa) -> None:
    """All strongly negative, all huge, one giant: the classic ways to a NaN."""
    rows = [torch.full((50,), -1e30), torch.full((50,), 1e30), torch.zeros(50), torch.randn(50)]
    logits = torch.stack(rows)
    logits[2, 3] = 3e38
    x = logits.requires_grad_()
    stats = ops.token_stats(x, torch.full((4,), 3))
    assert stats.entropy.tolist()[:3] == pytest.approx([math.log(50), math.log(50), 0], abs=1e-6)
    (stats.logprob.sum() + stats.entropy.sum()).backward()
    assert bool(x.grad.isfinite().all())


def test_tokens_do_not_see_one_another(isa) -> None:
    hidden, head = torch.randn(70, 48), torch.randn(300, 48)
    labels = torch.randint(0, 300, (70,))
    whole = ops.linear_token_stats(hidden, head, labels)
    for some in (slice(0, 1), slice(13, 50)):
        part = ops.linear_token_stats(hidden[some], head, labels[some])
        assert torch.equal(part.entropy, whole.entropy[some])
        assert torch.equal(part.logprob, whole.logprob[some])


def test_every_isa_agrees(isa) -> None:
    hidden, head = torch.randn(40, 33), torch.randn(500, 33)
    labels = torch.randint(0, 500, (40,))
    with force_isa("ref"):
        want = ops.linear_token_stats(hidden, head, labels)
    got = ops.linear_token_stats(hidden, head, labels)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=0, atol=1e-5)
    assert torch.equal(got.argmax, want.argmax)


def test_the_lowest_of_equal_logits_is_the_argmax(isa) -> None:
    logits = torch.zeros(1, 5000)
    logits[0, [90, 91, 4000]] = 1.0
    assert int(ops.token_stats(logits).argmax) == 90
    assert int(ops.linear_token_stats(torch.ones(1, 1), logits.T.contiguous()).argmax) == 90


def test_shards_merge_to_the_whole(isa) -> None:
    logits = torch.randn(20, 900) * 5 + 200
    logits[4, :300] = -torch.inf  # a shard that is masked whole
    labels = torch.randint(300, 900, (20,))
    edges = [0, 300, 700, 900]
    parts = [
        ops.token_stats(logits[:, a:b], labels, first=a, vocabulary=900, check=False)
        for a, b in itertools.pairwise(edges)
    ]
    check(merge_shards(parts), reference.token_stats(logits, labels))


def test_a_frozen_head_gets_no_gradient_and_changes_none(isa) -> None:
    hidden, head = torch.randn(9, 8, requires_grad=True), torch.randn(40, 8)
    labels = torch.randint(0, 40, (9,))
    frozen = ops.linear_token_stats(hidden, head, labels).entropy.sum()
    (one,) = torch.autograd.grad(frozen, [hidden])
    trained = ops.linear_token_stats(hidden, head.requires_grad_(), labels).entropy.sum()
    other, _ = torch.autograd.grad(trained, [hidden, head])
    assert torch.equal(one, other)


@pytest.mark.parametrize("linear", [False, True])
def test_labels_out_of_range_are_refused_with_their_index(isa, linear) -> None:
    labels = torch.tensor([0, 7, 8, -1])
    op = ops.linear_token_stats if linear else ops.token_stats
    inputs = (torch.zeros(4, 2), torch.zeros(8, 2)) if linear else (torch.zeros(4, 8),)
    with pytest.raises(SaltireError, match=r"labels\[2\] is 8, outside the vocabulary of 8"):
        op(*inputs, labels)


def test_a_device_names_the_arguments_that_the_cpu_refuses() -> None:
    """There they are looked at after the pass, for bad ones have made statistics NaN."""
    for change in (
        {"labels": torch.tensor([0, 9, -3])},
        {"temperature": torch.tensor([1.0, 0, 2])},
    ):
        given = {"labels": torch.tensor([0, -100, 7]), "temperature": 0.5, **change}
        with pytest.raises(SaltireError) as refused:
            ops.token_stats(torch.zeros(3, 8), **given)
        with pytest.raises(SaltireError) as blamed:
            _Arguments("token_stats", given["labels"], given["temperature"], -100, 8).blame()
        assert str(blamed.value) == str(refused.value)
    _Arguments("token_stats", torch.tensor([0, -100, 7]), 0.5, -100, 8).blame()


def test_tokens_without_a_distribution_are_named(isa) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        logits = torch.zeros(2, 3, 40)
        logits[1, 2, :] = bad if bad == -torch.inf else 0.0
        logits[1, 2, 17] = bad
        with pytest.raises(SaltireError, match=r"token \[1, 2\]"):
            ops.token_stats(logits)
        unchecked = ops.token_stats(logits, check=False)
        assert unchecked.entropy.isnan().sum() == 1
    with pytest.raises(SaltireError, match="token 1"):
        ops.linear_token_stats(torch.tensor([[1.0], [torch.nan]]), torch.ones(5, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature.*above 0"),
        ({"temperature": torch.ones(3)}, "one for each of 4"),
        ({"softcap": -1.0}, "softcap"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
        ({"labels": torch.zeros(4)}, "int64"),
        ({"logits": torch.zeros(4, 0)}, "vocabulary is empty"),
        ({"logits": torch.zeros(4, 8, dtype=torch.int32)}, "float32, bfloat16 or float16"),
        ({"vocabulary": 4, "labels": torch.zeros(4, dtype=torch.int64)}, "vocabulary of 4"),
    ],
)
def test_bad_input_is_refused(change, message) -> None:
    arguments = {"logits": torch.zeros(4, 8), **change}
    with pytest.raises(SaltireError, match=message):
        ops.token_stats(**arguments)


def test_no_tokens_give_no_statistics(isa) -> None:
    assert ops.token_stats(torch.zeros(0, 8)).entropy.shape == (0,)
    hidden = torch.zeros(0, 4, requires_grad=True)
    head = torch.zeros(8, 4, requires_grad=True)
    stats = ops.linear_token_stats(hidden, head)
    stats.entropy.sum().backward()
    assert float(head.grad.abs().sum()) == 0


@settings(max_examples=40, deadline=None)
@given(
    entropies=st.lists(st.integers(0, 30), min_size=1, max_size=40),
    share=st.floats(0.01, 1.0),
)
def test_top_entropy_mask_keeps_the_share_with_the_highest(entropies, share) -> None:
    entropy = torch.tensor(entropies, dtype=torch.float32)
    chosen = top_entropy_mask(entropy, share)
    assert int(chosen.sum()) >= math.ceil(share * len(entropies) - 1e-9)
    if not bool(chosen.all()):
        assert entropy[chosen].min() > entropy[~chosen].max()
        assert int((entropy > entropy[chosen].min()).sum()) < math.ceil(share * len(entropies))


def test_ops_pass_opcheck() -> None:
    one = torch.ones(1)
    labels = torch.tensor([0, 3, 1])
    logits = torch.randn(3, 5, requires_grad=True)
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    tail = (one, 0.0, -100, 0, 0)
    torch.library.opcheck(torch.ops.saltire.token_stats, (logits, labels, *tail))
    torch.library.opcheck(torch.ops.saltire.linear_token_stats, (hidden, head, bias, labels, *tail))
