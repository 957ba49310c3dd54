"""The jobs that workers run: embed a block of documents; score, order, pack and write a shard."""

from __future__ import annotations

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saltire.files import replacing_file
from saltire.models.loading import load_model, load_tokenizer
from saltire.synth.config import SynthConfig
from saltire.synth.dependency import (
    DependencyScorer,
    GroupScores,
    Windows,
    direction_moments,
    pruned_edges,
)
from saltire.synth.encode import load_encoder
from saltire.synth.metrics import dependency_distance, ngram_copy_rate
from saltire.synth.neighbours import block_file
from saltire.synth.orders import order_group
from saltire.synth.pack import make_separator, pack
from saltire.synth.score_cache import ScoreCache
from saltire.synth.store import DocumentStore, document_id
from saltire.synth.write import shard_file, write_shard

BLOCK = 512  # documents embedded by one job
NATS = (-20.0, 60.0, 40)  # histogram of gains: from, to, bins


@dataclass(frozen=True)
class Work:
    """The places of a run below its output folder."""

    out: Path

    @property
    def folder(self) -> Path:
        return self.out / ".work"

    @property
    def documents(self) -> Path:
        return self.folder / "documents"

    @property
    def keep(self) -> Path:
        return self.folder / "keep.npy"

    @property
    def vectors(self) -> Path:
        return self.folder / "vectors"

    @property
    def samples(self) -> Path:
        return self.folder / "samples.npz"

    @property
    def data(self) -> Path:
        return self.out / "data"

    def sidecar(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:06d}.json"

    def config(self) -> SynthConfig:
        return SynthConfig(**json.loads((self.folder / "run.json").read_text())["config"])

    def cache(self) -> Path:
        return Path(json.loads((self.folder / "run.json").read_text())["cache"])

    def shard_samples(self, shard: int) -> list[list[list[int]]]:
        """The samples of a shard, each a list of groups of places in ``keep``."""
        size = self.config().samples_per_shard
        with np.load(self.samples) as file:
            documents, groups, samples = file["documents"], file["groups"], file["samples"]
        result = []
        for s in range(shard * size, min((shard + 1) * size, len(samples) - 1)):
            bounds = groups[samples[s] : samples[s + 1] + 1]
            spans = itertools.pairwise(bounds)
            result.append([documents[a:b].tolist() for a, b in spans])
        return result


def save_samples(path: Path, samples: list[list[list[int]]]) -> None:
    """Flat arrays: documents, the bounds of groups in them, the bounds of samples in groups."""
    groups = [group for sample in samples for group in sample]
    with replacing_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            documents=np.array([i for group in groups for i in group], np.int64),
            groups=np.cumsum([0, *map(len, groups)]),
            samples=np.cumsum([0, *map(len, samples)]),
        )


@functools.lru_cache(maxsize=1)
def _encoder(name: str) -> Any:
    return load_encoder(name)


@functools.lru_cache(maxsize=1)
def _documents(folder: Path) -> tuple[DocumentStore, NDArray[np.int64]]:
    work = Work(folder)
    return DocumentStore(work.documents), np.load(work.keep)


@functools.lru_cache(maxsize=1)
def _tokenizer(config: SynthConfig) -> Any:
    return load_tokenizer(config.tokenizer or config.scorer)


@functools.lru_cache(maxsize=1)
def _scorer(config: SynthConfig, cache: Path) -> DependencyScorer:
    model, own_tokenizer = load_model(config.scorer, dtype=getattr(torch, config.scorer_dtype))
    windows = Windows(config.context_window, config.score_window)
    return DependencyScorer(model, own_tokenizer, windows, ScoreCache(cache))


def forget() -> None:
    """Drop what jobs keep between calls in this process: models, stores, tokenizers."""
    for cached in (_encoder, _documents, _tokenizer, _scorer):
        cached.cache_clear()


def embed_block(out: str, block: int) -> None:
    """Embed kept documents block·BLOCK.. into their file."""
    work = Work(Path(out))
    store, keep = _documents(work.out)
    texts = [store.text(int(n)) for n in keep[block * BLOCK : (block + 1) * BLOCK]]
    vectors = _encoder(work.config().encoder)(texts)
    with replacing_file(block_file(work.vectors, block)) as temporary, temporary.open("wb") as file:
        np.save(file, vectors)


def build_shard(out: str, shard: int) -> None:
    """Score, order, pack and write a shard, then what it counts as a sidecar."""
    work = Work(Path(out))
    config = work.config()
    built = [_Sample(work, config, groups, shard, k) for k, groups in _numbered(work, shard)]
    records = [s.record for s in built]
    write_shard(shard_file(work.data, shard, config.format), records)
    gains = np.concatenate([s.gains for s in built])
    histogram, _ = np.histogram(np.clip(gains, NATS[0], NATS[1]), NATS[2], NATS[:2])
    reach = [dependency_distance(r) for r in records]
    facts = {
        "samples": len(built),
        "tokens": [r["tokens"] for r in records],
        "documents": sum(len(r["documents"]) for r in records),
        "groups": sum(len(r["groups"]) for r in records),
        "exact": sum(r["exact"] for r in records),
        "objective": sum(r["objective"] for r in records),
        "bound": sum(r["bound"] for r in records),
        "edges": len(gains),
        "gain_sum": float(gains.sum()),
        "gain_histogram": histogram.tolist(),
        "forward_nats": sum(d.nats for d in reach),
        "forward_nat_tokens": sum(d.nats * d.mean for d in reach),
        "far_nats": sum(d.nats * d.far_share for d in reach),
        "copy_rate": sum(s.copy_rate for s in built),
        "direction_squared": sum(s.moments[0] for s in built),
        "direction_noise": sum(s.moments[1] for s in built),
    }
    with replacing_file(work.sidecar(shard)) as temporary:
        temporary.write_text(json.dumps(facts))


def _numbered(work: Work, shard: int) -> list[tuple[int, list[list[int]]]]:
    return list(enumerate(work.shard_samples(shard)))


class _Sample:
    """One sample: its record, the gains of its edges, its copying, and its direction's moments."""

    def __init__(
        self, work: Work, config: SynthConfig, groups: list[list[int]], shard: int, number: int
    ) -> None:
        store, keep = _documents(work.out)
        sequence: list[int] = []  # places in keep, in final order
        order: list[int] = []
        edges: list[dict[str, Any]] = []
        value = bound = 0.0
        exact, self.moments = True, (0.0, 0.0)
        for index, grown in enumerate(groups):
            group = sorted(grown)  # the order of input
            vectors = _vectors(work, group)
            similarity = vectors @ vectors.T
            tokens = store.index["tokens"][keep[group]].astype(np.int64)
            scores = _score(work, config, group, similarity) if config.needs_scores else None
            entropy = np.random.SeedSequence([config.seed, shard, number, index])
            seed = int(entropy.generate_state(1)[0])
            found = order_group(
                config, tokens, similarity, None if scores is None else scores.gain, seed
            )
            first = len(sequence)
            sequence += [group[i] for i in found.order]
            order += [first + i for i in found.order]
            value, bound = value + found.value, bound + found.bound
            exact = exact and found.exact
            if scores is not None:
                moments = direction_moments(scores)
                self.moments = (self.moments[0] + moments[0], self.moments[1] + moments[1])
                edges += _edges(scores, found.order, first)
        separator = make_separator(config.separator, _tokenizer(config))
        numbers = [int(keep[place]) for place in sequence]
        packed = pack(
            [store.text(n) for n in numbers],
            [int(store.index["tokens"][n]) for n in numbers],
            separator,
        )
        names = [store.id(n) for n in numbers]
        self.copy_rate = ngram_copy_rate([store.tokens(n) for n in numbers])
        self.gains = np.array([edge["nats"] for edge in edges])
        self.record: dict[str, Any] = {
            "id": document_id("\n".join(names)),
            "text": packed.text,
            "tokens": packed.tokens,
            "documents": names,
            "starts": packed.starts,
            "ends": packed.ends,
            "token_starts": packed.token_starts,
            "token_ends": packed.token_ends,
            "order": order,
            "groups": [len(group) for group in groups],
            "edges": edges,
            "objective": value,
            "bound": bound,
            "gap": (bound - value) / abs(bound) if bound != value else 0.0,
            "exact": exact,
        }


def _vectors(work: Work, places: list[int]) -> NDArray[np.float64]:
    rows = [np.load(block_file(work.vectors, p // BLOCK), mmap_mode="r")[p % BLOCK] for p in places]
    return np.stack(rows).astype(np.float64)


def _score(
    work: Work, config: SynthConfig, group: list[int], similarity: NDArray[np.float64]
) -> GroupScores:
    store, keep = _documents(work.out)
    numbers = [int(keep[place]) for place in group]
    texts = [store.tokens(n) for n in numbers]
    scorer = _scorer(config, work.cache())
    if config.tokenizer and config.tokenizer != config.scorer:
        texts = [scorer.encode(store.text(n)) for n in numbers]
    edges = pruned_edges(similarity, config.edges)
    return scorer.score_group([store.id(n) for n in numbers], texts, edges)


def _edges(scores: GroupScores, order: list[int], first: int) -> list[dict[str, Any]]:
    """The scored edges, their documents by place in the sample."""
    place = {document: first + k for k, document in enumerate(order)}
    return [
        {
            "source": place[int(a)],
            "target": place[int(b)],
            "nats": float(scores.gain[a, b]),
            "std": float(scores.variance[a, b] ** 0.5),
        }
        for a, b in np.argwhere(scores.scored)
    ]
