"""How long and how strong the dependencies of a text are, and how much of them is copying."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saltire.errors import SaltireError
from saltire.ops.token_stats import linear_token_stats
from saltire.synth.shared_prefix import SharedPrefixScorer

Floats = NDArray[np.float64]
STRENGTH = 0.1  # of a pair of chunks, below which it does not count
KEY_NATS = 2.0


def chunk_pairs(chunks: int, most: int | None = 500, seed: int = 0) -> list[tuple[int, int]]:
    """Pairs (i, j), j < i, of chunks to compare: ``most`` of them drawn, or all if no more exist.

    ProLong's script draws 500 always; where fewer exist nothing is scored and the document's score
    is 0, whatever it holds (issue 1 of its repository). Here a short document has all its pairs.
    """
    pairs = [(i, j) for i in range(chunks) for j in range(i)]
    if most is None or len(pairs) <= most:
        return pairs
    drawn = np.random.default_rng(seed).choice(len(pairs), most, replace=False)
    return [pairs[k] for k in sorted(drawn)]


def chunk_perplexities(
    scorer: SharedPrefixScorer,
    tokens: NDArray[np.int64],
    *,
    chunk: int = 128,
    most: int | None = 500,
    seed: int = 0,
) -> tuple[Floats, Floats]:
    """Perplexity of each chunk alone, [N], and behind an earlier one, [N, N]; NaN: not compared.

    Tokens behind the last whole chunk are left out; the first token of a chunk is context only.
    """
    parts = [torch.from_numpy(tokens[k : k + chunk]) for k in range(0, len(tokens), chunk)]
    parts = [part for part in parts if len(part) == chunk]
    n = len(parts)
    if n < 2:
        raise SaltireError(
            f"{len(tokens)} tokens are {n} chunks of {chunk}; expected at least 2 chunks."
        )
    empty = torch.zeros(0, dtype=torch.int64)
    alone = np.array([_perplexity(s) for s in scorer.score(empty, parts)])
    behind = np.full((n, n), np.nan)
    pairs = sorted(chunk_pairs(n, most, seed), key=lambda pair: pair[1])
    for j, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        targets = [i for i, _ in group]
        scores = scorer.score(parts[j], [parts[i] for i in targets])
        behind[targets, j] = [_perplexity(s) for s in scores]
    return alone, behind


def _perplexity(logprobs: torch.Tensor) -> float:
    return float(np.exp(-logprobs.double().mean()))


def long_dependency_score(alone: Floats, behind: Floats) -> float:
    """ProLong's score of a document from the perplexities of its N chunks.

    LDS = Σ (DST_ij + DDI_ij) · DSP_i over the compared pairs with DST_ij > 0.1, where
    DST_ij = (p_i - p_ij) / p_i is what chunk j does for chunk i, DDI_ij = (i - j) / (N - 1) their
    distance, and DSP_i = (ln m - H_i) / ln m, in [0, 1], how special the m compared chunks of row i
    are to it: H_i is the entropy of softmax_j(p_i - p_ij); 1 for m = 1. alone: [N]. behind:
    [N, N], NaN where not compared. The sum grows with the number of pairs: compare documents of
    equal length. Source: ProLong (2405.17915), section 3; its code.
    """
    n = len(alone)
    if behind.shape != (n, n) or n < 2:
        raise SaltireError(
            f"alone is {alone.shape} and behind {behind.shape}; expected [N] and [N, N], N >= 2."
        )
    total = 0.0
    for i in range(1, n):
        j = np.flatnonzero(~np.isnan(behind[i, :i]))
        if not len(j):
            continue
        gained = alone[i] - behind[i, j]
        strength = gained / alone[i]
        special = 1.0
        if len(j) > 1:
            p = np.exp(gained - gained.max())
            p /= p.sum()
            entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
            special = float(np.clip(1 - entropy / np.log(len(j)), 0, 1))
        counts = strength > STRENGTH
        total += float((strength + (i - j) / (n - 1))[counts].sum()) * special
    return total


@dataclass(frozen=True)
class DependencyDistance:
    """nats: of all forward gains. mean: tokens from a giver's end to its receiver's start, weighted
    by gain. far_share: of the nats that pass over at least a quarter of the sample."""

    nats: float
    mean: float
    far_share: float


def dependency_distance(sample: Mapping[str, Any]) -> DependencyDistance:
    """How far the scored dependencies of a sample reach; gains that are not positive count 0.

    sample: ``edges``, ``token_starts``, ``token_ends`` and ``tokens`` as a shard holds them.
    """
    forward = [e for e in sample["edges"] if e["target"] > e["source"] and e["nats"] > 0]
    nats = np.array([e["nats"] for e in forward])
    starts, ends = sample["token_starts"], sample["token_ends"]
    distance = np.array([starts[e["target"]] - ends[e["source"]] for e in forward])
    total = float(nats.sum())
    if total == 0:
        return DependencyDistance(0.0, 0.0, 0.0)
    far = float(nats[distance >= sample["tokens"] / 4].sum())
    return DependencyDistance(total, float((nats * distance).sum()) / total, far / total)


@torch.inference_mode()
def token_nlls(model: Any, tokens: torch.Tensor, context: int = 0, stride: int = 0) -> torch.Tensor:
    """Negative log-probability of each token from the second on, in nats: f32 [T - 1].

    tokens: int64 [T]. context: tokens that a prediction may look back on, at least context - stride
    + 1 of them (fewer only at the start); 0: all. stride: tokens scored in one pass, default a
    quarter of the context. model: a transformers causal model with an ordinary head.
    """
    T = len(tokens)
    context = context or T
    stride = stride or max(1, context // 4)
    if not 1 <= stride <= context:
        raise SaltireError(f"stride = {stride}; expected 1 to the context of {context} tokens.")
    head = model.get_output_embeddings()
    parts, done = [], 1
    while done < T:
        end = min(T, done + stride if done > 1 else context)
        start = max(0, end - context)
        hidden = model.model(tokens[None, start : end - 1]).last_hidden_state[0]
        stats = linear_token_stats(
            hidden[done - 1 - start :], head.weight, tokens[done:end], bias=head.bias
        )
        assert stats.logprob is not None  # labels were given
        parts.append(-stats.logprob)
        done = end
    return torch.cat(parts) if parts else torch.zeros(0)


@dataclass(frozen=True)
class KeyTokenGap:
    """tokens: bool [T], those that need the long context. share: of all. gap: nats that it saves on
    each of them on average. long_perplexity: of them, with the long context (LongPPL)."""

    tokens: NDArray[np.bool_]
    share: float
    gap: float
    long_perplexity: float


def key_token_gap(short: Floats, full: Floats, *, nats: float = KEY_NATS) -> KeyTokenGap:
    """Key tokens: with the full context likelier by more than ``nats``, and then likely at all.

    short, full: NLLs [T] of the same tokens with a short and with the full context. A token is key
    if short - full > nats and full < nats. Without one, gap is 0 and long_perplexity NaN. Source:
    LongPPL (2410.23771); there one model finds the key tokens of the text on which all are judged.
    """
    if short.shape != full.shape or short.ndim != 1:
        raise SaltireError(f"short is {short.shape}, full {full.shape}; expected both [T].")
    key = (short - full > nats) & (full < nats)
    if not key.any():
        return KeyTokenGap(key, 0.0, 0.0, float("nan"))
    gap = float((short - full)[key].mean())
    return KeyTokenGap(key, float(key.mean()), gap, float(np.exp(full[key].mean())))


def ngram_copy_rate(documents: Sequence[NDArray[np.int64]], n: int = 8) -> float:
    """Share of the n-grams of all documents but the first that an earlier document holds.

    documents: token ids in the order of the sample. 0 if there is none to count. Copies win a
    language model's likelihood for nothing, so a gain in it is worth little where this is high.
    """
    seen: set[bytes] = set()
    copied = total = 0
    for k, ids in enumerate(documents):
        tokens = np.ascontiguousarray(ids, np.int64)
        grams = [tokens[i : i + n].tobytes() for i in range(len(tokens) - n + 1)]
        if k:
            copied += sum(gram in seen for gram in grams)
            total += len(grams)
        seen.update(grams)
    return copied / total if total else 0.0
