"""Metrics of long dependency: the formulas by hand, and what must not change them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saltire.errors import SaltireError
from saltire.synth.metrics import (
    chunk_pairs,
    chunk_perplexities,
    dependency_distance,
    key_token_gap,
    long_dependency_score,
    ngram_copy_rate,
    token_nlls,
)
from saltire.synth.shared_prefix import SharedPrefixScorer
from tests.tiny import random_tokens, tiny_model


def test_the_long_dependency_score_of_three_chunks_by_hand() -> None:
    alone = np.array([9.0, 10.0, 8.0])
    behind = np.full((3, 3), np.nan)
    behind[1, 0], behind[2, 0], behind[2, 1] = 6.0, 4.0, 7.9
    p = 1 / (1 + math.exp(0.1 - 4))  # softmax of the gains 4 and 0.1 of chunk 2
    special = 1 + (p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    # 1 behind 0: strength 0.4, distance 1/2, alone in its row. 2 behind 1 is weaker than 0.1.
    want = (0.4 + 0.5) + (0.5 + 1) * special
    assert long_dependency_score(alone, behind) == pytest.approx(want)
    assert long_dependency_score(alone, np.full((3, 3), np.nan)) == 0


def test_a_short_document_has_all_its_pairs_and_a_long_one_as_many_as_asked() -> None:
    assert chunk_pairs(4) == [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    drawn = chunk_pairs(60, 500, seed=1)
    assert len(set(drawn)) == 500
    assert all(j < i < 60 for i, j in drawn)
    assert drawn == chunk_pairs(60, 500, seed=1) != chunk_pairs(60, 500, seed=2)
    assert len(chunk_pairs(60, None)) == 60 * 59 // 2


def test_chunk_perplexities_are_those_of_plain_forwards() -> None:
    model = tiny_model("llama")
    tokens = random_tokens(model, 1, 34)[0]
    alone, behind = chunk_perplexities(SharedPrefixScorer(model), tokens.numpy(), chunk=8)
    assert alone.shape == (4,)  # two tokens are left over
    assert np.isnan(behind[np.triu_indices(4)]).all()
    with torch.no_grad():
        logits = model(torch.cat([tokens[8:16], tokens[24:32]])[None]).logits[0, 8:15]
    nll = torch.nn.functional.cross_entropy(logits, tokens[25:32])
    assert behind[3, 1] == pytest.approx(float(nll.exp()), rel=1e-4)
    assert long_dependency_score(alone, behind) >= 0
    with pytest.raises(SaltireError, match="at least 2 chunks"):
        chunk_perplexities(SharedPrefixScorer(model), tokens.numpy()[:15], chunk=8)


def test_dependency_distance_weighs_forward_gains_by_tokens_between() -> None:
    edges = [
        {"source": 0, "target": 1, "nats": 3.0},
        {"source": 0, "target": 2, "nats": 1.0},
        {"source": 2, "target": 0, "nats": 50.0},  # backward
        {"source": 1, "target": 2, "nats": -4.0},  # no help
    ]
    sample = {
        "edges": edges,
        "tokens": 100,
        "token_starts": [0, 20, 60],
        "token_ends": [20, 60, 90],
    }
    found = dependency_distance(sample)
    assert (found.nats, found.mean, found.far_share) == (4.0, 10.0, 0.25)
    assert dependency_distance({**sample, "edges": []}).nats == 0


@pytest.mark.parametrize(("context", "stride"), [(0, 0), (40, 7), (6, 1), (8, 3)])
def test_token_nlls_look_back_at_most_on_the_context(context: int, stride: int) -> None:
    model = tiny_model("qwen2")
    tokens = random_tokens(model, 1, 20)[0]
    got = token_nlls(model, tokens, context, stride)
    with torch.no_grad():
        whole = model(tokens[None]).logits[0, :-1]
    full = torch.nn.functional.cross_entropy(whole, tokens[1:], reduction="none")
    assert len(got) == 19
    if context in (0, 40):
        torch.testing.assert_close(got, full)
        return
    torch.testing.assert_close(got[: context - 1], full[: context - 1])
    with torch.no_grad():
        last = model(tokens[None, -context:-1]).logits[0, -1]
    assert got[-1] == pytest.approx(-float(last.log_softmax(-1)[tokens[-1]]), rel=1e-3)
    assert not torch.allclose(got[context:], full[context:])


def test_key_tokens_need_the_context_and_are_likely_with_it() -> None:
    short, full = np.array([5.0, 9.0, 1.0, 4.0]), np.array([1.0, 6.0, 0.5, 1.9])
    found = key_token_gap(short, full)
    assert found.tokens.tolist() == [True, False, False, True]
    assert (found.share, found.gap) == (0.5, pytest.approx(3.05))
    assert found.long_perplexity == pytest.approx(math.exp(1.45))
    assert key_token_gap(full, full).gap == 0
    with pytest.raises(SaltireError, match="expected both"):
        key_token_gap(short, full[:2])


def test_only_what_an_earlier_document_holds_is_copied() -> None:
    one, two = np.arange(20), np.arange(100, 120)
    assert ngram_copy_rate([one, two]) == 0
    assert ngram_copy_rate([one, one]) == 1
    assert ngram_copy_rate([one, np.r_[two, one]], n=4) == pytest.approx(17 / 37)
    assert ngram_copy_rate([np.tile(one, 3), two]) == 0  # copies within a document are its own
    assert ngram_copy_rate([one]) == ngram_copy_rate([one, one[:3]]) == 0
