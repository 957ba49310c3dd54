"""A native decoder: a whole step of a language model in one compiled call, on a static cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.kv_cache import KVCache
from saltire.nn.quant_linear import QuantLinear
from saltire.ops.decoder_layer import (
    ATTENTION,
    MLP,
    PRIVATE,
    decoder_close,
    decoder_draft,
    decoder_open,
    decoder_step,
)

PREFILL_ROWS = 256  # rows of one pass over the weights; bounds the memory of a long prompt


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
class LinearWeights:
    """A linear layer: dense, or with ``act_bits`` a quantised one (see ``QuantLinear``).

    weight: f32, bf16 or f16 [N, K], or the prepacked uint8 buffer. bias: [N] or None. second: the
    second of two quantised factors; the rest is then the first, [R, K].
    """

    weight: Tensor
    bias: Tensor | None = None
    act_bits: int = 0
    clip: float = 1.0
    hadamard: int = 1
    diag: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    low_rank_in: Tensor | None = None
    low_rank_out: Tensor | None = None
    second: LinearWeights | None = None

    @classmethod
    def of(cls, name: str, module: nn.Module) -> LinearWeights:
        """The weights of an nn.Linear, a QuantLinear or a FactoredQuantLinear on the CPU, shared;
        else SaltireError."""
        if isinstance(module, FactoredQuantLinear):
            return replace(cls.of(name, module.down), second=cls.of(name, module.up))
        if isinstance(module, QuantLinear):
            format = module.format
            return cls(
                weight=module.prepare(),
                bias=module.bias,
                act_bits=format.act_bits,
                clip=format.clip,
                hadamard=format.hadamard,
                diag=module.diag,
                left=module.left,
                right=module.right,
                low_rank_in=module.low_rank_in,
                low_rank_out=module.low_rank_out,
            )
        if not isinstance(module, nn.Linear):
            raise SaltireError(
                f"{name} is a {type(module).__name__}; the decoder runs nn.Linear in "
                "float32, bfloat16 or float16, QuantLinear and FactoredQuantLinear."
            )
        if module.weight.device.type != "cpu":
            raise SaltireError(f"{name} is on {module.weight.device}; move the model with .cpu().")
        if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise SaltireError(f"{name} is {module.weight.dtype}; cast the model to float32.")
        return cls(module.weight, module.bias)


@dataclass(frozen=True)
class LayerWeights:
    """One block: norms [D] (q_norm, k_norm [head_dim]), linears, slots it looks back (0: all)."""

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    linears: tuple[LinearWeights, ...]  # q, k, v, o, gate, up, down
    window: int = 0


@dataclass(frozen=True)
class StepResult:
    """logits: f32 [m, V] of the wanted rows. best: their first largest, int64 [m]. share: f32 [m],
    the probability of best at temperature 1."""

    logits: Tensor
    best: Tensor
    share: Tensor


class _Description:
    """The flat form of a model that ``decoder_open`` reads."""

    def __init__(self, embedding: Tensor) -> None:
        self.tensors = [embedding.detach()]
        self.values: list[int] = []
        self.clips: list[float] = []

    def add(self, tensor: Tensor | None, as_float: bool = False) -> None:
        if tensor is None:
            self.values.append(-1)
            return
        tensor = tensor.detach()
        self.tensors.append(tensor.float().contiguous() if as_float else tensor)
        self.values.append(len(self.tensors) - 1)

    def add_linear(self, linear: LinearWeights) -> None:
        self.add(linear.weight)
        self.add(linear.bias, as_float=True)
        self.values.append(linear.act_bits)
        self.clips.append(linear.clip)
        if linear.act_bits:
            self.values.append(int(linear.second is not None))
            self.values.append(linear.hadamard)
            for factor in (linear.diag, linear.left, linear.right):
                self._add_shared(factor)
            self.add(linear.low_rank_in)
            self.add(linear.low_rank_out)
        if linear.second is not None:
            self.add_linear(linear.second)

    def _add_shared(self, factor: Tensor | None) -> None:
        """Layers that read one input have equal factors in tensors of their own: name one of them,
        so that the decoder sees that they are the same."""
        recent = range(max(1, len(self.tensors) - 12), len(self.tensors))
        if factor is not None:
            for index in recent:
                other = self.tensors[index]
                if other.dtype == factor.dtype and torch.equal(other, factor):
                    self.values.append(index)
                    return
        self.add(factor)


class Decoder:
    """Llama, Mistral, Qwen2 or Qwen3 on Saltire's kernels; shares the weights it is made from.

    A row's logits depend on its cache and on the way they are computed (``prefill`` or ``step``),
    never on the other rows: verifying a draft gives exactly what decoding token by token gives.
    One call at a time; ``saltire.models.decoder.build_decoder`` makes one from a model.
    """

    def __init__(
        self,
        sizes: DecoderSizes,
        eps: float,
        embedding: Tensor,
        head: LinearWeights,
        final_norm: Tensor,
        layers: Sequence[LayerWeights],
        rotation: Callable[[Tensor], tuple[Tensor, Tensor]],
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:
        """rotation: positions [T] -> cosines and sines, f32 [T, head_dim / 2] each. cache_dtype: of
        the caches that the model was made for."""
        self.cache_dtype = cache_dtype
        self.sizes, self.layers = sizes, len(layers)
        description = _Description(embedding)
        description.add(final_norm, as_float=True)
        description.add_linear(head)
        for layer in layers:
            description.values.append(layer.window)
            for norm in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm):
                description.add(norm, as_float=True)
            for linear in layer.linears:
                description.add_linear(linear)
        shape = (
            sizes.hidden,
            sizes.ffn,
            sizes.heads,
            sizes.kv_heads,
            sizes.head_dim,
            sizes.vocabulary,
        )
        tensors = description.tensors
        self._handle = decoder_open(tensors, shape, description.values, description.clips, eps)
        weakref.finalize(self, decoder_close, self._handle)
        self._rotation_of = rotation
        self._rotation = torch.empty(0, 2, sizes.head_dim // 2)
        self.all_units = torch.full((self.layers,), ATTENTION | MLP, dtype=torch.uint8)
        unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        self.weight_bytes = sum(unique.values())
        tied = head.weight.data_ptr() == embedding.data_ptr()
        # A step reads a few rows of the embedding, unless it is the head as well.
        self.read_bytes = self.weight_bytes - (0 if tied else unique[embedding.data_ptr()])

    def new_cache(self, sequences: int, slots: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for this decoder, of ``cache_dtype`` if no other is given; SaltireError if
        the model has no such positions."""
        sizes = self.sizes
        if slots > sizes.positions:
            raise SaltireError(
                f"{slots} slots; the model has {sizes.positions} positions. Ask for fewer."
            )
        dtype = dtype or self.cache_dtype
        return KVCache(self.layers, sizes.kv_heads, sizes.head_dim, sequences, slots, dtype)

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
        logits = torch.empty(len(asking), self.sizes.vocabulary)
        best = torch.empty(len(asking), dtype=torch.int64)
        share = torch.empty(len(asking))
        for place, b in enumerate(asking):
            # One sequence after another, in pieces at fixed places: its result does not depend on
            # who else is there.
            prompt, base = prompts[b], cache.lengths[b]
            for start in range(0, len(prompt), PREFILL_ROWS):
                piece = prompt[start : start + PREFILL_ROWS]
                last = start + len(piece) == len(prompt)
                part = None
                if trace is not None and last:
                    part = torch.empty(trace.shape[0], 1, trace.shape[2])
                result = self.step_rows(
                    cache,
                    self.chain_rows(b, base + start, piece),
                    wanted=[len(piece) - 1] if last else [],
                    trace=part,
                    prefill=True,
                )
                cache.lengths[b] = base + start + len(piece)
            logits[place], best[place], share[place] = result.logits, result.best, result.share
            if trace is not None and part is not None:
                trace[:, place] = part[:, 0]
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
        """``decoder_step`` with this decoder's weights; see it for the columns of a row."""
        m = len(wanted)
        logits = torch.empty(m, self.sizes.vocabulary)
        kv, scales = cache.state()
        best, share = decoder_step(
            self._handle,
            kv,
            scales,
            self._rotation_for(cache.slots),
            torch.as_tensor(rows, dtype=torch.int64),
            self.all_units if units is None else units,
            torch.as_tensor(wanted, dtype=torch.int64),
            logits,
            hidden,
            trace,
            prefill=prefill,
        )
        return StepResult(logits, best, share)

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
        kv, scales = cache.state()
        tokens, shares, counts = decoder_draft(
            self._handle,
            kv,
            scales,
            self._rotation_for(cache.slots),
            torch.as_tensor(starts, dtype=torch.int64),
            self.all_units if units is None else units,
            survival,
            max((start[3] for start in starts), default=0),
            confidence,
            worth,
            head_outputs,
        )
        kept = counts.tolist()
        return (
            [row[:n] for row, n in zip(tokens.tolist(), kept, strict=True)],
            [row[:n] for row, n in zip(shares.tolist(), kept, strict=True)],
        )

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

    def _rotation_for(self, positions: int) -> Tensor:
        if positions > self._rotation.shape[0]:
            cosines, sines = self._rotation_of(torch.arange(positions))
            self._rotation = torch.stack([cosines, sines], dim=1).float().contiguous()
        return self._rotation

    def _check(self, cache: KVCache, tokens: Sequence[Sequence[int]]) -> None:
        if len(tokens) != cache.sequences:
            raise SaltireError(
                f"{len(tokens)} lists of tokens; the cache has {cache.sequences} sequences."
            )
        cache.check_room([len(sequence) for sequence in tokens])
