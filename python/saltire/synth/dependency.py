"""How much one document helps to predict another: windows, nats, direction and its noise.

For documents A and B::

    gain(A -> B) = Σ_u log p(B_u | tail of A, B_<u) - log p(B_u | B_<u),   u = 2..t

over the head of B, in nats, with t = min(score_window, |A|, |B|) the same in both directions. For a
consistent model and whole documents the gain is pointwise mutual information, which is symmetric;
dividing it by |B| would make a direction out of lengths. Equal windows of head and tail leave only
the direction that is in the texts: S = (W + Wᵀ)/2 is cohesion, A = (W - Wᵀ)/2 direction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saltire.synth.score_cache import ScoreCache
from saltire.synth.shared_prefix import SharedPrefixScorer

BLANK = "\n\n"  # between A and B
MOST_TARGET_TOKENS = 8192  # of one pass; bounds its memory


@dataclass(frozen=True)
class Windows:
    """context: tokens of the tail of A. score: tokens of the head of B."""

    context: int
    score: int


@dataclass(frozen=True)
class GroupScores:
    """gain: f64 [n, n] nats, entry [a, b] what a gives to b, 0 where not scored. variance: f64
    [n, n] nats², of gain, from the scatter of its tokens. scored: bool [n, n]."""

    gain: NDArray[np.float64]
    variance: NDArray[np.float64]
    scored: NDArray[np.bool_]

    @property
    def cohesion(self) -> NDArray[np.float64]:
        return (self.gain + self.gain.T) / 2

    @property
    def direction(self) -> NDArray[np.float64]:
        return (self.gain - self.gain.T) / 2


def direction_moments(group: GroupScores) -> tuple[float, float]:
    """Sums over the pairs scored both ways: of their squared differences, and of the variance that
    the scatter of their tokens explains; nats²."""
    a, b = np.nonzero(np.triu(group.scored & group.scored.T, 1))
    squared = ((group.gain[a, b] - group.gain[b, a]) ** 2).sum()
    return float(squared), float((group.variance[a, b] + group.variance[b, a]).sum())


def signal_to_noise(squared: float, noise: float) -> float:
    """Root of the variance of true directions over that of their noise, from summed moments.

    √(max(0, Σ difference² - Σ noise²) / Σ noise²). 0: directions are no more than noise.
    """
    return float(np.sqrt(max(0.0, squared - noise) / noise)) if noise else 0.0


def pruned_edges(similarity: NDArray[np.float64], k: int) -> list[tuple[int, int]]:
    """Both directions of each document's k most similar others in its group, sorted."""
    n = len(similarity)
    near = similarity.copy()
    np.fill_diagonal(near, -np.inf)
    order = np.argsort(-near, axis=1, kind="stable")[:, : min(k, n - 1)]
    pairs = {(i, int(j)) for i in range(n) for j in order[i]}
    return sorted(pairs | {(j, i) for i, j in pairs})


class DependencyScorer:
    """Gains of the edges of a group by a causal language model."""

    def __init__(
        self, model: Any, tokenizer: Any, windows: Windows, cache: ScoreCache | None = None
    ) -> None:
        self.scorer = SharedPrefixScorer(model)
        self.windows = windows
        self.cache = cache
        self.tokenizer = tokenizer
        self.joint = torch.from_numpy(self.encode(BLANK))
        self.key = self._fingerprint(model)

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids of a text as the scorer reads it, without special tokens."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.array(ids, np.int64)

    def score_group(
        self,
        names: Sequence[str],
        tokens: Sequence[NDArray[np.int64]],
        edges: Sequence[tuple[int, int]],
    ) -> GroupScores:
        """Score the edges (a, b) among documents, given by id and token ids."""
        n, windows = len(names), self.windows
        heads = [torch.from_numpy(np.asarray(t[: windows.score])) for t in tokens]
        alone = self._task(None, torch.zeros(0, dtype=torch.int64), names, heads)
        gain, variance = np.zeros((n, n)), np.zeros((n, n))
        scored = np.zeros((n, n), bool)
        for a in range(n):
            followers = [b for source, b in edges if source == a]
            if not followers:
                continue
            tail = torch.from_numpy(np.asarray(tokens[a][-windows.context :]))
            behind = self._task(
                names[a],
                torch.cat([tail, self.joint]),
                [names[b] for b in followers],
                [heads[b] for b in followers],
            )
            for b, with_a in zip(followers, behind, strict=True):
                count = min(windows.score, len(tokens[a]), len(tokens[b])) - 1
                gains = with_a[:count].astype(np.float64) - alone[b][:count]
                gain[a, b] = gains.sum()
                variance[a, b] = gains.var(ddof=1) * count if count > 1 else 0.0
                scored[a, b] = count > 0
        return GroupScores(gain, variance, scored)

    def _task(
        self,
        context: str | None,
        prefix: torch.Tensor,
        names: Sequence[str],
        heads: Sequence[torch.Tensor],
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities of heads behind a prefix, from the cache if they are there.

        The unit of the cache is the task, not the edge: the last bits of a matrix product depend on
        its number of rows, and a resumed run must give the same bits as one that was not cut off.
        """
        result: list[NDArray[np.float32]] = []
        step = max(1, MOST_TARGET_TOKENS // self.windows.score)
        for start in range(0, len(heads), step):
            part, part_names = heads[start : start + step], names[start : start + step]
            sizes = [len(head) - 1 for head in part]
            parts = [self.key, context or "", *part_names]
            key = hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()
            flat = self.cache.get(key) if self.cache else None
            if flat is None or len(flat) != sum(sizes):
                scores = self.scorer.score(prefix, part)
                flat = torch.cat(scores).numpy().astype(np.float32)
                if self.cache:
                    self.cache.put(key, flat)
            result += np.split(flat, np.cumsum(sizes)[:-1])
        return result

    def _fingerprint(self, model: Any) -> str:
        """Names model, windows and joint: what a cached score depends on beside the texts."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in model.state_dict().items():
            some = tensor.detach().flatten()[:1024].contiguous().cpu().view(torch.uint8)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(some.numpy().tobytes())
        digest.update(repr((self.windows, self.joint.tolist())).encode())
        return digest.hexdigest()
