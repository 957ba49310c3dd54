"""Rollouts by our own decoder, on the very weights that are trained; nothing is copied but LoRA's.

A prompt that several completions share is read once. A completion that has stopped takes no more
work. A row's logits do not depend on the other rows, so completions do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.nn.decoder import Decoder
from saltire.nn.kv_cache import KVCache
from saltire.ops.decoder_layer import SLOT_BLOCK
from saltire.progress import track
from saltire.rl.lora import LoraLinear
from saltire.rl.rollout import invert_distribution, refuse_non_finite


class DecoderRollout:
    """See :class:`saltire.rl.rollout.Rollout`; ``batch`` sequences at a time."""

    def __init__(self, decoder: Decoder, stop: Sequence[int], batch: int = 64) -> None:
        if not stop:
            raise SaltireError(
                "rollout: the tokenizer has no end-of-sequence token, so no completion would end. "
                "Set one."
            )
        self.decoder, self.batch = decoder, batch
        self.stop = torch.tensor(list(stop))

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float
    ) -> list[list[int]]:
        """One completion for each prompt; uniforms: f64 [B, T]."""
        starts = range(0, len(prompts), self.batch)
        if len(starts) > 1:
            starts = track(starts, "rollouts", total=len(starts))  # type: ignore[assignment]
        completions: list[list[int]] = []
        for start in starts:
            end = start + self.batch
            completions += self._batch(prompts[start:end], uniforms[start:end], temperature)
        return completions

    def _batch(
        self, prompts: Sequence[list[int]], uniforms: Tensor, temperature: float
    ) -> list[list[int]]:
        steps = uniforms.shape[1]
        cache = self.decoder.new_cache(len(prompts), max(map(len, prompts)) + steps)
        logits = self._read(cache, prompts)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        completions: list[list[int]] = [[] for _ in prompts]
        active = torch.arange(len(prompts))
        for step in range(steps):
            refuse_non_finite(logits, step, active)
            tokens = invert_distribution(logits, uniforms[active, step], temperature)
            for row, token in zip(active.tolist(), tokens.tolist(), strict=True):
                completions[row].append(token)
            going = ~torch.isin(tokens, self.stop)
            active, tokens = active[going], tokens[going]
            if step + 1 == steps or not len(active):
                break
            slot = lengths[active] + step
            rows = torch.stack(
                [tokens, active, slot, slot, slot + 1, torch.zeros_like(slot)], dim=1
            )
            # Always the products for many rows: the choice must not hang on who else is here.
            logits = self.decoder.step_rows(
                cache, rows, torch.arange(len(active)), prefill=True
            ).logits
        return completions

    def _read(self, cache: KVCache, prompts: Sequence[list[int]]) -> Tensor:
        """Put every prompt into its sequence of the cache; the logits behind each, f32 [B, V]."""
        first: dict[tuple[int, ...], int] = {}
        owner = [first.setdefault(tuple(prompt), b) for b, prompt in enumerate(prompts)]
        alone = [prompt if owner[b] == b else [] for b, prompt in enumerate(prompts)]
        unique = self.decoder.prefill(cache, alone).logits
        place = {b: i for i, b in enumerate(dict.fromkeys(owner))}
        for b, source in enumerate(owner):
            if source != b:
                # whole blocks: within one, keys lie transposed
                end = -(-len(prompts[b]) // SLOT_BLOCK) * SLOT_BLOCK
                cache.kv[:, :, b, :, :end] = cache.kv[:, :, source, :, :end]
        return unique[[place[source] for source in owner]]


def merge_lora(trained: nn.Module, copy: nn.Module) -> None:
    """Write W + (alpha/rank)·B·A of every adapter in ``trained`` to the same layer of ``copy``."""
    with torch.no_grad():
        for name, layer in trained.named_modules():
            if isinstance(layer, LoraLinear):
                low = layer.scale * (layer.lora_B @ layer.lora_A)
                target = copy.get_submodule(name)
                assert isinstance(target, nn.Linear)
                target.weight.copy_(layer.weight + low)
