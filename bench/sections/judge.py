"""A small language model of another kind than the scorer: n-grams and a cache, trained here.

p(w | past) mixes Witten-Bell trigrams of the training text with a cache of what the sample has said
so far: unigrams and bigrams, each occurrence weighing half as much every HALF_LIFE words. The
mixture is fitted on held-out text. It can use a far document only by its words, but it shares no
weight, no tokenizer and no training text with the scorer, and it is trained in seconds.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

HALF_LIFE = 1000  # words
VOCABULARY = 20_000
_WORD = re.compile(r"\w+|[^\w\s]")


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class Judge:
    """Train on texts, fit the mixture on others, then ask for the NLLs of samples."""

    def __init__(self, training: Sequence[str], fitting: Sequence[str]) -> None:
        streams = [words(text) for text in training]
        common = Counter(w for s in streams for w in s).most_common(VOCABULARY)
        self.number = {w: i + 1 for i, (w, _) in enumerate(common)}  # 0: every other word
        self.grams: list[dict[tuple[int, ...], Counter[int]]] = [
            defaultdict(Counter) for _ in range(3)
        ]
        for stream in streams:
            ids = self._ids(stream)
            for k, w in enumerate(ids):
                for order in range(min(3, k + 1)):
                    self.grams[order][tuple(ids[k - order : k])][w] += 1
        self.totals = [
            {context: counts.total() for context, counts in level.items()} for level in self.grams
        ]
        parts = [self._parts(text) for text in fitting]
        joined = [np.concatenate([p[k] for p in parts]) for k in range(3)]
        grid = [(u, b) for u, b in product((0.05, 0.1, 0.2, 0.3), repeat=2) if u + b < 1]
        self.mixture = min(grid, key=lambda m: -float(np.log(_mix(joined, m)).mean()))

    def nll(self, text: str) -> NDArray[np.float64]:
        """Negative log-probability of each word, in nats; the cache is empty at the start."""
        return -np.log(_mix(self._parts(text), self.mixture))

    def _ids(self, stream: Sequence[str]) -> list[int]:
        return [self.number.get(w, 0) for w in stream]

    def _trigram(self, ids: Sequence[int], k: int) -> float:
        p = 1 / (len(self.number) + 1)
        for order in range(min(3, k + 1)):
            context = tuple(ids[k - order : k])
            counts = self.grams[order].get(context)
            if counts is None:
                break
            total = self.totals[order][context]
            p = (counts.get(ids[k], 0) + len(counts) * p) / (total + len(counts))
        return p

    def _parts(self, text: str) -> list[NDArray[np.float64]]:
        """Of each word: its trigram, cached unigram and cached bigram probabilities."""
        ids = self._ids(words(text))
        out = np.empty((3, len(ids)))
        one: dict[int, float] = defaultdict(float)
        two: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
        sums: dict[int, float] = defaultdict(float)
        everything, weight, growth = 0.0, 1.0, 2 ** (1 / HALF_LIFE)
        for k, w in enumerate(ids):
            before = ids[k - 1] if k else 0
            base = self._trigram(ids, k)
            out[0, k] = base
            out[1, k] = one[w] / everything if everything else base
            out[2, k] = two[before][w] / sums[before] if sums[before] else out[1, k]
            weight *= growth  # growing weights of the new are shrinking weights of the old
            one[w] += weight
            everything += weight
            two[before][w] += weight
            sums[before] += weight
            if weight > 1e200:
                raise OverflowError("a sample of more than 600,000 words")
        return list(out)


def _mix(parts: Sequence[NDArray[np.float64]], mixture: tuple[float, float]) -> NDArray[np.float64]:
    one, two = mixture
    mixed: NDArray[np.float64] = (1 - one - two) * parts[0] + one * parts[1] + two * parts[2]
    return np.maximum(mixed, 1e-12)
