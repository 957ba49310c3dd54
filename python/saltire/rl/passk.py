"""Pass@k without bias: the chance that at least one of k samples is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from saltire.errors import SaltireError


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 − C(n − c, k) / C(n, k), for n samples of which c are right; k ≤ n.

    Source: Chen et al., Evaluating large language models trained on code (2021). As a product of k
    factors, so that no binomial overflows.
    """
    if not 0 <= correct <= samples:
        raise SaltireError(f"pass@k: {correct} correct of {samples} samples is not possible.")
    if not 1 <= k <= samples:
        raise SaltireError(
            f"pass@k: k is {k} with {samples} samples; k must be between 1 and the samples. "
            "Draw more samples per prompt, or ask for a smaller k."
        )
    all_wrong = 1.0
    for i in range(k):
        all_wrong *= max(0, samples - correct - i) / (samples - i)
    return 1.0 - all_wrong


def mean_pass_at_k(counts: Iterable[tuple[int, int]], ks: Sequence[int]) -> dict[int, float]:
    """The mean of :func:`pass_at_k` over prompts, given as (samples, correct), for each k.

    A prompt with fewer than k samples is left out of that k's mean; a k with no prompt is absent.
    """
    counts = list(counts)
    result = {}
    for k in ks:
        values = [pass_at_k(n, c, k) for n, c in counts if n >= k]
        if values:
            result[k] = sum(values) / len(values)
    return result
