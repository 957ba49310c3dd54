"""The decoder of the CPU: a whole step in one compiled call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.nn.decoder import Decoder, DecoderSizes, LayerWeights, StepResult
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.kv_cache import KVCache
from saltire.nn.quant_embedding import QuantEmbedding
from saltire.nn.quant_linear import QuantLinear
from saltire.ops.decoder_layer import (
    CONFIDENCE_BINS,
    decoder_close,
    decoder_draft,
    decoder_open,
    decoder_step,
)


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


class _Description:
    """The flat form of a model that ``decoder_open`` reads."""

    def __init__(self, embedding: Tensor | QuantEmbedding) -> None:
        # The embedding comes first, and the scales of its codes, if it has any, second.
        self.tensors = (
            [embedding.weight_packed, embedding.weight_scale]
            if isinstance(embedding, QuantEmbedding)
            else [embedding.detach()]
        )
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


class NativeDecoder(Decoder):
    """A decoder on the CPU; shares the weights it is made from."""

    def __init__(
        self,
        sizes: DecoderSizes,
        eps: float,
        embedding: Tensor | QuantEmbedding,
        head: nn.Module,
        final_norm: Tensor,
        layers: Iterable[LayerWeights],
        rotation: Callable[[Tensor], tuple[Tensor, Tensor]],
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:
        """rotation: positions [T] -> cosines and sines, f32 [T, head_dim / 2] each."""
        description = _Description(embedding)
        description.add(final_norm, as_float=True)
        output = LinearWeights.of("lm_head", head)
        description.add_linear(output)
        count = 0
        for layer in layers:
            count += 1
            description.values.append(layer.window)
            for norm in (layer.input_norm, layer.post_norm, layer.q_norm, layer.k_norm):
                description.add(norm, as_float=True)
            for name, linear in layer.linears.items():
                description.add_linear(LinearWeights.of(name, linear))
        self._describe(sizes, count, cache_dtype)
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
        unique = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
        self.weight_bytes = sum(unique.values())
        rows = tensors[:2] if isinstance(embedding, QuantEmbedding) else tensors[:1]
        tied = output.weight.data_ptr() == rows[0].data_ptr()
        # A step reads a few rows of the embedding, unless it is the head as well.
        unread = 0 if tied else sum(unique[t.data_ptr()] for t in rows)
        self.read_bytes = self.weight_bytes - unread

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

    def run_ahead(
        self, cache: KVCache, starts: Sequence[Sequence[int]], count: int
    ) -> list[list[int]]:
        wanted = [[*start, count] for start in starts]
        return self.draft(cache, wanted, torch.ones(CONFIDENCE_BINS))[0]

    def verify_rows(self, rows: int) -> None:
        """Nothing to do: steps of any number of rows always give a row the same bits."""

    def _rotation_for(self, positions: int) -> Tensor:
        if positions > self._rotation.shape[0]:
            cosines, sines = self._rotation_of(torch.arange(positions))
            self._rotation = torch.stack([cosines, sines], dim=1).float().contiguous()
        return self._rotation
