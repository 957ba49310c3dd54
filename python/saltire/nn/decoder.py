"""What a decoder is: a whole step of a language model on a static cache, on whatever device."""

from __future__ import annotations

import bisect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.nn.kv_cache import KVCache
from saltire.ops.decoder_layer import ATTENTION, MLP, PRIVATE


@dataclass(frozen=True)
class DecoderSizes:
    """hidden D, ffn, heads, kv_heads, head_dim, vocabulary V, positions (longest context)."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int


@dataclass(frozen=True)
class LayerWeights:
    """One block: norms [D] (q_norm, k_norm [head_dim]), linears, slots it looks back (0: all).

    linears: q, k, v, o, gate, up, down by the names that errors give them; each an nn.Linear, a
    QuantLinear or a FactoredQuantLinear.
    """

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    linears: Mapping[str, nn.Module]
    window: int = 0


@dataclass(frozen=True)
class StepResult:
    """logits: f32 [m, V] of the wanted rows. best: their first largest, int64 [m]. share: f32 [m],
    the probability of best at temperature 1."""

    logits: Tensor
    best: Tensor
    share: Tensor


class Decoder(ABC):
    """Llama, Mistral, Qwen2 or Qwen3 on Saltire's kernels.

    A row's logits depend on its cache and on the way they are computed (``prefill`` or ``step``),
    never on the other rows: verifying a draft gives exactly what decoding token by token gives (on
    a device after ``verify_rows``). One call at a time; ``saltire.models.decoder.build_decoder``
    makes one from a model: ``NativeDecoder`` on the CPU, ``DeviceDecoder`` on a CUDA device.

    prefill_rows: of one pass over the weights; bounds the memory of a long prompt. cache_dtype: of
    the caches that the model was made for. all_units: uint8 [L], on the CPU. read_bytes: of weights
    that a step reads. ahead: steps that pay before the host looks at their tokens.
    """

    prefill_rows = 256
    ahead = 1
    device = torch.device("cpu")
    sizes: DecoderSizes
    layers: int
    cache_dtype: torch.dtype
    all_units: Tensor
    weight_bytes: int
    read_bytes: int

    def new_cache(self, sequences: int, slots: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for this decoder, of ``cache_dtype`` if no other is given; SaltireError if
        the model has no such positions."""
        sizes = self.sizes
        if slots > sizes.positions:
            raise SaltireError(
                f"{slots} slots; the model has {sizes.positions} positions. Ask for fewer."
            )
        dtype = dtype or self.cache_dtype
        return KVCache(
            self.layers, sizes.kv_heads, sizes.head_dim, sequences, slots, dtype, self.device
        )

    @property
    def joined_prompts(self) -> int:
        """Prompts that may end in one pass. On the CPU fewer than 16 rows, from where on the head
        adds up the other way; on a device one, whose attention has a way of its own."""
        return 15 if self.device.type == "cpu" else 1

    def prefill(
        self, cache: KVCache, prompts: Sequence[Sequence[int]], trace: Tensor | None = None
    ) -> StepResult:
        """Append a prompt to each sequence and commit it; logits of each prompt's last token.

        prompts: one for each sequence of the cache; an empty one leaves its sequence alone and has
        no row in the result. trace: f32 [2L + 1, m, D], the states of those last tokens.
        """
        self._check(cache, prompts)
        asking = [b for b, prompt in enumerate(prompts) if prompt]
        if not asking:
            raise SaltireError("every prompt is empty; expected at least one token.")
        m, device = len(asking), self.device
        logits = torch.empty(m, self.sizes.vocabulary, device=device)
        best = torch.empty(m, dtype=torch.int64, device=device)
        share = torch.empty(m, device=device)
        rows = [row for b in asking for row in self.chain_rows(b, cache.lengths[b], prompts[b])]
        ends = list(itertools.accumulate(len(prompts[b]) for b in asking))
        # A row's result depends on no other row of its pass, so prompts may share one.
        start = first = 0
        while start < len(rows):
            most = min(first + self.joined_prompts, len(ends))
            stop = min(start + self.prefill_rows, ends[most - 1])
            beyond = bisect.bisect_right(ends, stop)
            part = None
            if trace is not None and beyond > first:
                part = trace.new_empty(trace.shape[0], beyond - first, trace.shape[2])
            result = self.step_rows(
                cache,
                rows[start:stop],
                wanted=[end - 1 - start for end in ends[first:beyond]],
                trace=part,
                prefill=True,
            )
            logits[first:beyond], best[first:beyond] = result.logits, result.best
            share[first:beyond] = result.share
            if trace is not None and part is not None:
                trace[:, first:beyond] = part
            start, first = stop, beyond
        for b in asking:
            cache.lengths[b] += len(prompts[b])
        return StepResult(logits, best, share)

    def step(
        self,
        cache: KVCache,
        tokens: Sequence[Sequence[int]],
        units: Tensor | None = None,
        trace: Tensor | None = None,
        commit: bool = True,
    ) -> StepResult:
        """Append some tokens to each sequence; logits of every one of them, sequence by sequence.

        units: uint8 [L], which units run (``all_units``). commit: count the tokens as the cache's.
        """
        self._check(cache, tokens)
        rows = [
            row
            for b, sequence in enumerate(tokens)
            for row in self.chain_rows(b, cache.lengths[b], sequence)
        ]
        result = self.step_rows(cache, rows, range(len(rows)), units, trace)
        if commit:
            for b, sequence in enumerate(tokens):
                cache.lengths[b] += len(sequence)
        return result

    @abstractmethod
    def step_rows(
        self,
        cache: KVCache,
        rows: Sequence[Sequence[int]] | Tensor,
        wanted: Sequence[int] | Tensor,
        units: Tensor | None = None,
        trace: Tensor | None = None,
        hidden: Tensor | None = None,
        prefill: bool = False,
    ) -> StepResult:
        """``saltire.ops.decoder_layer.decoder_step`` with this decoder's weights; see it for the
        columns of a row."""

    @abstractmethod
    def draft(
        self,
        cache: KVCache,
        starts: Sequence[Sequence[int]],
        survival: Tensor,
        units: Tensor | None = None,
        confidence: float = 0.0,
        worth: float = 0.0,
        head_outputs: int = 0,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """``decoder_draft`` with this decoder's weights: tokens and shares of each start."""

    @abstractmethod
    def run_ahead(
        self, cache: KVCache, starts: Sequence[Sequence[int]], count: int
    ) -> list[list[int]]:
        """``count`` greedy steps in a row, each fed the best tokens of the one before. Writes to
        the cache, commits nothing.

        starts: a token that is not yet in the cache, its sequence and its slot; up to 64 of them.
        Returns the tokens that follow each start.
        """

    @abstractmethod
    def verify_rows(self, rows: int) -> None:
        """Steps of up to so many rows are to give a row the same bits, however many there are."""

    @staticmethod
    def chain_rows(sequence: int, base: int, tokens: Sequence[int]) -> list[list[int]]:
        """Rows of tokens that follow one another in a sequence from slot ``base`` on."""
        return [
            [token, sequence, slot, slot, slot + 1, 0]
            for slot, token in enumerate(tokens, start=base)
        ]

    @staticmethod
    def private_rows(sequence: int, position: int, count: int) -> list[list[int]]:
        """Rows at one position that see what is before it and themselves, and leave no trace."""
        return [[0, sequence, position, PRIVATE, position, 0]] * count

    def _check(self, cache: KVCache, tokens: Sequence[Sequence[int]]) -> None:
        if len(tokens) != cache.sequences:
            raise SaltireError(
                f"{len(tokens)} lists of tokens; the cache has {cache.sequences} sequences."
            )
        cache.check_room([len(sequence) for sequence in tokens])

    def _describe(self, sizes: DecoderSizes, layers: int, cache_dtype: torch.dtype) -> None:
        self.sizes, self.layers, self.cache_dtype = sizes, layers, cache_dtype
        self.all_units = torch.full((layers,), ATTENTION | MLP, dtype=torch.uint8)
