"""Dependency between documents: which pairs, from equal windows, scored once even after a cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from saltire.errors import SaltireError
from saltire.synth import dependency, synthesise
from saltire.synth.dependency import (
    DependencyScorer,
    GroupScores,
    Windows,
    direction_moments,
    pruned_edges,
    signal_to_noise,
)
from saltire.synth.score_cache import ScoreCache
from saltire.synth.shared_prefix import SharedPrefixScorer
from tests.synth.small_runs import corpus, digests, small
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = ("the river runs under a stone bridge", "a mill by the river", "bread in an oven", "grain")


@pytest.fixture
def parts():
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=512)
    return model, tiny_tokenizer()


def test_the_edges_are_the_nearest_of_each_in_both_directions() -> None:
    alike = np.array([[1, 0.9, 0.1, 0], [0.9, 1, 0.8, 0], [0.1, 0.8, 1, 0.2], [0, 0, 0.2, 1]])
    assert pruned_edges(alike, 1) == [(0, 1), (1, 0), (1, 2), (2, 1), (2, 3), (3, 2)]
    assert len(pruned_edges(alike, 3)) == len(pruned_edges(alike, 9)) == 12


@torch.no_grad()
def test_a_gain_is_the_nats_that_the_tail_of_one_gives_the_head_of_the_other(parts) -> None:
    model, tokenizer = parts
    scorer = DependencyScorer(model, tokenizer, Windows(context=10, score=8))
    tokens = [scorer.encode(text) for text in TEXTS]
    got = scorer.score_group("abcd", tokens, [(0, 1), (1, 0), (1, 3)])

    def log_prob(prefix: list[int], head: list[int]) -> float:
        ids = torch.tensor([*prefix, *head])
        rows = model(ids[None]).logits[0].double().log_softmax(-1)[len(prefix) : -1]
        return float(rows.gather(1, ids[len(prefix) + 1 :, None]).sum())

    for a, b in [(0, 1), (1, 0), (1, 3)]:
        head = tokens[b][: min(8, len(tokens[a]))].tolist()
        tail = [*tokens[a][-10:].tolist(), *scorer.encode("\n\n").tolist()]
        want = log_prob(tail, head) - log_prob([], head)
        assert got.gain[a, b] == pytest.approx(want, abs=1e-4)
    assert got.scored.sum() == 3
    np.testing.assert_allclose(got.cohesion + got.direction, got.gain)
    np.testing.assert_array_equal(got.direction, -got.direction.T)


def test_direction_is_told_from_noise_only_beyond_the_scatter_of_tokens() -> None:
    gain = np.array([[0.0, 5.0], [1.0, 0.0]])
    both = ~np.eye(2, dtype=bool)
    squared, noise = direction_moments(GroupScores(gain, np.full((2, 2), 0.5), both))
    assert (squared, noise) == (16.0, 1.0)
    assert signal_to_noise(squared, noise) == pytest.approx(15**0.5)
    assert signal_to_noise(0.9, 1.0) == 0
    one_way = GroupScores(gain, np.ones((2, 2)), np.triu(both))
    assert direction_moments(one_way) == (0.0, 0.0)


def test_the_cache_tells_windows_and_models_apart_and_forgets_nothing(
    parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = parts
    calls: list[int] = []
    score = SharedPrefixScorer.score
    monkeypatch.setattr(
        SharedPrefixScorer, "score", lambda self, *a: (calls.append(1), score(self, *a))[1]
    )

    def gains(model, windows: Windows) -> np.ndarray:
        scorer = DependencyScorer(model, tokenizer, windows, ScoreCache(tmp_path / "scores"))
        tokens = [scorer.encode(text) for text in TEXTS]
        return scorer.score_group("abcd", tokens, [(0, 1), (1, 0)]).gain

    first = gains(model, Windows(10, 8))
    assert len(calls) == 3  # all alone, and behind each of two
    np.testing.assert_array_equal(gains(model, Windows(10, 8)), first)
    assert len(calls) == 3
    assert not np.array_equal(gains(model, Windows(12, 8)), first)
    other = tiny_model("llama", seed=1, vocab_size=259, max_position_embeddings=512)
    assert not np.array_equal(gains(other, Windows(10, 8)), first)
    assert len(calls) == 9


def test_a_run_cut_off_within_a_shard_scores_only_what_is_left(
    tmp_path, scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(corpus(tmp_path / "in.jsonl", 40))
    config = small(scorer, samples_per_shard=64)  # one shard
    calls: list[int] = []
    score = SharedPrefixScorer.score
    most = [10**9]

    def counted(self: SharedPrefixScorer, *arguments):
        if len(calls) == most[0]:
            raise KeyboardInterrupt
        calls.append(1)
        return score(self, *arguments)

    monkeypatch.setattr(dependency.SharedPrefixScorer, "score", counted)
    synthesise([source], tmp_path / "whole", config)
    whole = len(calls)
    calls.clear()
    most[0] = whole // 2
    with pytest.raises(KeyboardInterrupt):
        synthesise([source], tmp_path / "cut", config)
    assert not list((tmp_path / "cut").glob("data/*"))
    most[0] = whole
    synthesise([source], tmp_path / "cut", config, resume=True)
    assert len(calls) == whole
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_a_damaged_cache_is_refused_and_a_damaged_score_is_made_again(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path / "scores")
    cache.put(b"k" * 16, np.ones(3, np.float32))
    cache._db.execute("UPDATE scores SET value = zeroblob(12)")
    assert cache.get(b"k" * 16) is None
    cache.close()
    (tmp_path / "text").write_text(json.dumps(["no database"] * 100))
    with pytest.raises(SaltireError, match=r"cannot use the score cache .*text"):
        ScoreCache(tmp_path / "text")
