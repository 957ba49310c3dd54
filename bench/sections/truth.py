"""Mixed sections of articles in every order: what it recovers, what a judge thinks of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from harness import Report
from numpy.typing import NDArray

from saltire.models import load_model
from saltire.synth.config import ORDERS, SynthConfig
from saltire.synth.dependency import (
    DependencyScorer,
    GroupScores,
    Windows,
    direction_moments,
    pruned_edges,
    signal_to_noise,
)
from saltire.synth.encode import load_encoder
from saltire.synth.groups import Budget, form_samples
from saltire.synth.metrics import ngram_copy_rate
from saltire.synth.neighbours import block_file, nearest
from saltire.synth.orders import order_group
from sections.judge import Judge, words
from sections.recovery import Recovered, difference, interval, recovered
from sections.wikitext import articles, cut

ARTICLES, SECTIONS = 3, 5  # of a group: 15 documents, of an article
BUCKETS = (0, 500, 1000, 2000, 10**9)  # words
SHUFFLES = 8
QUICK = 4  # groups


@dataclass(frozen=True)
class Group:
    """Documents in shuffled order; article, place: whose section each is, and its number there."""

    texts: list[str]
    article: list[int]
    place: list[int]
    tokens: list[NDArray[np.int64]]
    similarity: NDArray[np.float64]
    scores: GroupScores

    def orders(self, name: str) -> list[list[int]]:
        """What ``--order name`` makes of the group; a shuffle is drawn SHUFFLES times."""
        config = SynthConfig(order=name)
        lengths = np.array([len(t) for t in self.tokens])
        seeds = range(SHUFFLES if name == "shuffle" else 1)
        return [
            order_group(config, lengths, self.similarity, self.scores.gain, seed).order
            for seed in seeds
        ]


def scored_groups(quick: bool) -> list[Group]:
    """Groups of the test articles, scored as ``saltire synth`` does by default."""
    config = SynthConfig()
    sections = [cut(article, SECTIONS) for article in articles("test")]
    sections = [s for s in sections if len(s) == SECTIONS]
    count = QUICK if quick else len(sections) // ARTICLES
    encode = load_encoder(config.encoder)
    model, tokenizer = load_model(config.scorer, dtype=torch.float32)
    scorer = DependencyScorer(model, tokenizer, Windows(config.context_window, config.score_window))
    groups = []
    for number in range(count):
        mixed = [
            (text, a, place)
            for a in range(ARTICLES)
            for place, text in enumerate(sections[number * ARTICLES + a])
        ]
        mixed = [mixed[i] for i in np.random.default_rng(number).permutation(len(mixed))]
        texts = [text for text, _, _ in mixed]
        vectors = encode(texts).astype(np.float64)
        similarity = vectors @ vectors.T
        tokens = [scorer.encode(text) for text in texts]
        edges = pruned_edges(similarity, config.edges)
        scores = scorer.score_group([str(k) for k in range(len(texts))], tokens, edges)
        article, place = [a for _, a, _ in mixed], [p for _, _, p in mixed]
        groups.append(Group(texts, article, place, tokens, similarity, scores))
        print(f"scored group {number + 1} of {count}: {len(edges)} edges", flush=True)
    return groups


def ground_truth(report: Report, groups: list[Group]) -> None:
    """Tau, adjacency and purity of every order, and the difference of tau to the default order."""
    found = {name: _over_all(groups, name) for name in ORDERS}
    for name, values in found.items():
        row: dict[str, object] = {"case": "recovered", "variant": name, "rounds": len(values.tau)}
        for figure in ("tau", "adjacent", "purity"):
            mean, low, high = (round(v, 3) for v in interval(getattr(values, figure)))
            row |= {figure: mean, f"{figure}_low": low, f"{figure}_high": high}
            report.key(f"{figure}_{name}", mean)
        report.rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    ours = SynthConfig().order
    for name in ORDERS:
        if name != ours:
            mean, low, high = difference(found[ours].tau, found[name].tau)
            report.key(f"tau_gain_over_{name}", mean)
            report.key(f"tau_gain_over_{name}_low", low)
            report.key(f"tau_gain_over_{name}_high", high)
    moments = np.sum([direction_moments(g.scores) for g in groups], axis=0)
    report.key("direction_snr", signal_to_noise(*moments))
    mean, low, high = interval(_retrieved_purity())
    report.key("retrieved_purity", mean)
    report.key("retrieved_purity_low", low)
    report.key("retrieved_purity_high", high)


def _over_all(groups: list[Group], name: str) -> Recovered:
    """One value an article, the mean over the orders that ``name`` gives."""
    out = Recovered([], [], [])
    for group in groups:
        each = [recovered(order, group.article, group.place) for order in group.orders(name)]
        for figure in ("tau", "adjacent", "purity"):
            mean = np.mean([getattr(r, figure) for r in each], axis=0)
            getattr(out, figure).extend(mean.tolist())
    return out


def _retrieved_purity() -> list[float]:
    """All sections of the test articles, grouped by retrieval: the share, in each group, of the
    article that has most of it."""
    cuts = [cut(article, SECTIONS) for article in articles("test")]
    owners = np.array([a for a, pieces in enumerate(cuts) for _ in pieces])
    vectors = load_encoder(SynthConfig().encoder)([text for pieces in cuts for text in pieces])
    with tempfile.TemporaryDirectory() as name:
        np.save(block_file(Path(name), 0), vectors)
        ids, cosines = nearest(Path(name), 1, SynthConfig().neighbours)
    # Tokens of 1 and a target of one group: every sample is one group.
    budget = Budget(SECTIONS, 0, SECTIONS, 1)
    samples = form_samples(ids, cosines, np.ones(len(owners), np.int64), budget, 0.95)
    groups = [group for sample in samples for group in sample if len(group) > 1]
    return [Counter(owners[g].tolist()).most_common(1)[0][1] / len(g) for g in groups]


def judged(report: Report, groups: list[Group]) -> None:
    """The judge's NLL of every order, of the words behind the first document.

    ``unrelated`` packs documents of as many articles as there are documents, as a loader that does
    not retrieve would.
    """
    training = ["\n".join(a.sections) for a in articles("valid")]
    judge = Judge(training[:-10], training[-10:])
    nats: dict[str, list[float]] = {}
    for name in (*ORDERS, "unrelated"):
        means, buckets = [], [[] for _ in BUCKETS[1:]]
        for number, group in enumerate(groups):
            orders = [
                (group.texts, o) for o in group.orders("input" if name == "unrelated" else name)
            ]
            if name == "unrelated":
                orders = [(_unrelated(groups, number), list(range(len(group.texts))))]
            each = []
            for texts, order in orders:
                nll = judge.nll("\n\n".join(texts[i] for i in order))
                each.append(float(nll[len(words(texts[order[0]])) :].mean()))
                for k, (start, end) in enumerate(pairwise(BUCKETS)):
                    buckets[k] += nll[start:end].tolist()
            means.append(float(np.mean(each)))
        nats[name] = means
        mean, low, high = (round(v, 3) for v in interval(means))
        row: dict[str, object] = {"case": "judged", "variant": name, "rounds": len(means)}
        row |= {"nll": mean, "nll_low": low, "nll_high": high}
        row |= {
            f"nll_from_{start}": round(float(np.mean(values)), 3)
            for start, values in zip(BUCKETS, buckets, strict=False)
            if values
        }
        report.rows.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        report.key(f"judge_nll_{name}", mean)
    ours = SynthConfig().order
    for other in ("shuffle", "length", "neighbour", "reversed", "unrelated"):
        for key, value in zip(
            ("", "_low", "_high"), difference(nats[other], nats[ours]), strict=True
        ):
            report.key(f"judge_gain_over_{other}{key}", value)
    report.key("copy_rate", float(np.mean([ngram_copy_rate(g.tokens) for g in groups])))


def _unrelated(groups: list[Group], number: int) -> list[str]:
    """One document of each group in turn, as many as a group has."""
    rng = np.random.default_rng([number, 1])
    pool = [(g, d) for d in range(len(groups[0].texts)) for g in range(len(groups))]
    drawn = [pool[i] for i in rng.permutation(len(pool))[: len(groups[0].texts)]]
    return [groups[g].texts[d] for g, d in drawn]
