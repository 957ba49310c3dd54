"""The parts of a synthesis: scoring, ordering, grouping, packing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.synth import SynthConfig, cu_seqlens, document_mask, position_ids
from saltire.synth.groups import Budget, form_samples
from saltire.synth.orders import order_group
from saltire.synth.pack import make_separator, pack
from saltire.synth.shared_prefix import SharedPrefixScorer
from tests.tiny import ARCHITECTURES, tiny_model, tiny_tokenizer


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prefix_scores_equal_one_forward_a_pair(architecture: str) -> None:
    model = tiny_model(architecture)
    generator = torch.Generator().manual_seed(0)
    prefix, *targets = (torch.randint(3, 128, (t,), generator=generator) for t in (9, 5, 8, 2))
    for start in (prefix, prefix[:0]):
        got = SharedPrefixScorer(model).score(start, targets)
        for target, scores in zip(targets, got, strict=True):
            logits = model(torch.cat([start, target])[None]).logits[0].log_softmax(-1)
            rows = logits[len(start) : len(start) + len(target) - 1]
            torch.testing.assert_close(scores, rows.gather(1, target[1:, None])[:, 0])


def test_a_reversed_order_is_the_best_order_backwards() -> None:
    gain = np.random.default_rng(0).random((6, 6))
    np.fill_diagonal(gain, 0)
    tokens, alike = np.full(6, 10), np.eye(6)
    forward = order_group(SynthConfig(order="ordering"), tokens, alike, gain, 0)
    backward = order_group(SynthConfig(order="reversed"), tokens, alike, gain, 0)
    assert backward.order == forward.order[::-1]
    assert forward.value + backward.value == pytest.approx(gain.sum())


def test_orders_without_scores_do_what_they_say() -> None:
    tokens = np.array([5, 9, 1, 7])
    alike = np.array([[1, 0.1, 0.9, 0], [0.1, 1, 0.2, 0.8], [0.9, 0.2, 1, 0.3], [0, 0.8, 0.3, 1]])
    orders = {
        name: order_group(SynthConfig(order=name), tokens, alike, None, 3).order
        for name in ("input", "length", "neighbour", "shuffle")
    }
    assert orders["input"] == [0, 1, 2, 3]
    assert orders["length"] == [1, 3, 0, 2]
    assert orders["neighbour"] == [0, 2, 3, 1]
    assert sorted(orders["shuffle"]) == [0, 1, 2, 3]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), target=st.integers(40, 300), uses=st.integers(1, 3))
def test_samples_fit_and_use_every_document_at_most_as_often_as_allowed(
    seed: int, target: int, uses: int
) -> None:
    rng = np.random.default_rng(seed)
    n, k = 40, 5
    ids = rng.integers(-1, n, (n, k))
    cosines = rng.random((n, k)).astype(np.float32)
    tokens = rng.integers(1, 40, n)
    samples = list(form_samples(ids, cosines, tokens, Budget(target, 1, 6, uses), 0.95))
    used = np.zeros(n, int)
    for sample in samples:
        flat = [i for group in sample for i in group]
        assert len(flat) == len(set(flat))
        assert tokens[flat].sum() + len(flat) - 1 <= target
        assert all(len(group) <= 6 for group in sample)
        used[flat] += 1
    assert used.min() >= 1
    assert used.max() <= uses


@pytest.mark.parametrize("separator", ["blank", "raw", "eos", "text: -- "])
def test_offsets_give_back_the_documents(separator: str) -> None:
    tokenizer = tiny_tokenizer()
    texts = ["alpha", "b", "gamma delta"]
    packed = pack(texts, [len(t) for t in texts], make_separator(separator, tokenizer))
    spans = zip(packed.starts, packed.ends, strict=True)
    assert [packed.text[a:b] for a, b in spans] == texts
    ids = tokenizer(packed.text)["input_ids"]
    assert len(ids) == packed.tokens
    for k, text in enumerate(texts):
        piece = ids[packed.token_starts[k] : packed.token_ends[k]]
        assert tokenizer.decode(piece) == text


def test_a_tokenizer_without_eos_is_told_what_to_use() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(SaltireError, match="separator blank"):
        make_separator("eos", tokenizer)


def test_masks_keep_documents_apart() -> None:
    starts, tokens = [0, 3, 4], 7
    assert cu_seqlens(starts, tokens).tolist() == [0, 3, 4, 7]
    assert position_ids(starts, tokens).tolist() == [0, 1, 2, 0, 0, 1, 2]
    mask = document_mask(starts, tokens)
    assert mask[2].tolist() == [True] * 3 + [False] * 4
    assert mask[6].tolist() == [False] * 4 + [True] * 3


@pytest.mark.parametrize(
    "wrong", [{"order": "best"}, {"target_tokens": 3}, {"format": "csv"}, {"separator": "tab"}]
)
def test_settings_that_cannot_be_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(SaltireError, match=f"{next(iter(wrong))} = .*expected"):
        replace(SynthConfig(), **wrong)
