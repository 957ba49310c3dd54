"""Rollouts: completions sampled from the policy, behind one protocol.

What is sampled is decided by uniform numbers that are handed in, one for each token to be drawn.
They are a pure function of (seed, step, sequence), so completions do not depend on how sequences
are spread over ranks and batches, and a resumed run needs no generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from saltire.errors import SaltireError
from saltire.progress import track


class Rollout(Protocol):
    """Anything that samples completions: a transformers model, our decoder, a server."""

    def __call__(
        self, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float
    ) -> list[list[int]]:
        """One completion for each prompt.

        uniforms: f64 [B, T] in [0, 1); entry (b, t) decides the t-th token of completion b, and T
        is the most tokens a completion may have. A completion ends with its stop token, if it
        stopped. Token t must be the inverse of the distribution function at the uniform number, or
        at least sampled from the same distribution.
        """


def uniform_numbers(seed: int, step: int, sequences: Sequence[int], length: int) -> Tensor:
    """f64 [len(sequences), length] in [0, 1): the randomness of these sequences at this step.

    Philox is counter-based: (seed, step, sequence) is its key and counter, so no row depends on
    which others are asked for.
    """
    rows = [
        np.random.Generator(
            np.random.Philox(key=[seed, 0x5A17], counter=[0, 0, sequence, step])
        ).random(length)
        for sequence in sequences
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, length, dtype=torch.float64)


def invert_distribution(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """The token at which the distribution function of softmax(logits / T) passes each uniform.

    logits: [B, V]. uniforms: f64 [B]. Returns int64 [B]. The running sum is in float64: in float32
    it loses about V·2⁻²⁴ = 0.003 at V = 49,152, and with it the rare tokens.
    """
    cumulative = (logits.double() / temperature).softmax(dim=-1).cumsum(dim=-1)
    wanted = (uniforms.to(logits.device) * cumulative[:, -1]).unsqueeze(1)
    token = torch.searchsorted(cumulative, wanted, right=True).squeeze(1)
    return token.clamp(max=logits.shape[-1] - 1)


def refuse_non_finite(logits: Tensor, step: int, rows: Tensor | None = None) -> None:
    """SaltireError if a row of [B, V] logits has no distribution; ``rows`` are their numbers."""
    finite = logits.amax(dim=-1).isfinite()
    if bool(finite.all()):
        return
    row = int((~finite).nonzero()[0])
    raise SaltireError(
        f"rollout: the logits of sequence {row if rows is None else int(rows[row])} are not finite "
        f"at its token {step}. The weights have diverged: resume from an earlier checkpoint with a "
        "lower learning rate."
    )


class _Inversion(LogitsProcessor):
    """Makes ``generate``'s greedy choice the token that the uniform numbers pick."""

    def __init__(self, prompt_length: int, uniforms: Tensor, temperature: float) -> None:
        self.prompt_length, self.uniforms, self.temperature = prompt_length, uniforms, temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        refuse_non_finite(scores, step)
        token = invert_distribution(scores, self.uniforms[:, step], self.temperature)
        chosen = torch.full_like(scores, -torch.inf)
        return chosen.scatter_(1, token.unsqueeze(1), 0.0)


class TransformersRollout:
    """Completions by transformers' ``generate``, with its key-value cache."""

    def __init__(
        self, model: PreTrainedModel, stop: Sequence[int], pad: int, batch: int = 64
    ) -> None:
        if not stop:
            raise SaltireError(
                "rollout: the tokenizer has no end-of-sequence token, so no completion would end. "
                "Set one."
            )
        self.model, self.stop, self.pad, self.batch = model, list(stop), pad, batch

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float
    ) -> list[list[int]]:
        """See :class:`Rollout`."""
        training = self.model.training
        self.model.eval()
        try:
            starts = range(0, len(prompts), self.batch)
            if len(starts) > 1:
                starts = track(starts, "rollouts", total=len(starts))  # type: ignore[assignment]
            completions: list[list[int]] = []
            for start in starts:
                end = start + self.batch
                completions += self._batch(prompts[start:end], uniforms[start:end], temperature)
            return completions
        finally:
            self.model.train(training)

    def _batch(
        self, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float
    ) -> list[list[int]]:
        longest = max(map(len, prompts))
        device = self.model.device
        tokens = torch.full((len(prompts), longest), self.pad)
        attention = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention[row, longest - len(prompt) :] = 1
        output = self.model.generate(
            input_ids=tokens.to(device),
            attention_mask=attention.to(device),
            max_new_tokens=uniforms.shape[1],
            do_sample=False,
            num_beams=1,
            top_k=None,
            top_p=None,
            temperature=None,
            repetition_penalty=1.0,
            eos_token_id=self.stop,
            pad_token_id=self.pad,
            logits_processor=LogitsProcessorList([_Inversion(longest, uniforms, temperature)]),
        )
        return [cut_after_stop(row, self.stop) for row in output[:, longest:].tolist()]


def cut_after_stop(tokens: list[int], stop: Sequence[int]) -> list[int]:
    """The tokens up to and with the first stop token."""
    for place, token in enumerate(tokens):
        if token in stop:
            return tokens[: place + 1]
    return tokens
