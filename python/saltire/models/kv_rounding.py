"""Keys and values of few bits in transformers' own attention, with or without a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for
from saltire.models.cache_argument import cache_argument
from saltire.reference.kv_cache import KV_BITS, read_heads, rotate_heads, round_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNROUNDED = 16  # bits of a cache that stays as the model makes it
CHOICES = (*KV_BITS, UNROUNDED)
ATTENTION = "self_attn"


def check_kv_bits(bits: int) -> None:
    """Raise SaltireError unless keys and values can have so many bits."""
    if bits not in CHOICES:
        raise SaltireError(f"kv_bits = {bits!r}; expected 2, 4, 8, or 16 (not rounded).")


def rounded(x: Tensor, bits: int) -> Tensor:
    """Heads as a cache of ``bits`` bits gives them back, in x's dtype and basis.

    x: float [..., head_dim], keys after their position's rotation, or values. A query meets such
    keys as it is: rotating both would change no product. Gradients pass as if nothing was rounded.
    """
    with torch.no_grad():
        heads = rotate_heads(x.float())
        result = rotate_heads(read_heads(*round_heads(heads, bits))).to(x.dtype)
    return x + (result - x).detach() if x.requires_grad else result


class RoundingCache:
    """Stands in for the cache that an attention layer is given: rounds what comes, passes it on."""

    def __init__(self, cache: Any, bits: int) -> None:
        self._cache, self._bits = cache, bits

    def update(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = rounded(keys, self._bits), rounded(values, self._bits)
        if self._cache is None:
            return keys, values
        return self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Hook:
    """A forward pre-hook of an attention layer; an object, so that models can be copied."""

    def __init__(self, module: nn.Module, bits: int) -> None:
        self.bits = bits
        self.name = cache_argument(module)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = RoundingCache(kwargs.get(self.name), self.bits)
        return args, {**kwargs, self.name: cache}


def set_kv_bits(model: PreTrainedModel, bits: int) -> None:
    """Let every attention layer of a transformers model round its keys and values to ``bits``.

    They are rounded as they are made, so that prompts, plain forwards and generation all see what a
    cache of so many bits holds; 16 takes the rounding away. Raises SaltireError for other bits.
    """
    check_kv_bits(bits)
    for block in adapter_for(model.config).blocks(model):
        attention = block.get_submodule(ATTENTION)
        hooks = attention._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook)]:
            del hooks[key]
            attention._forward_pre_hooks_with_kwargs.pop(key, None)
        if bits != UNROUNDED:
            attention.register_forward_pre_hook(_Hook(attention, bits), with_kwargs=True)


def kv_bits(model: PreTrainedModel) -> int:
    """How many bits keys and values of the model have; 16 if they are not rounded."""
    block = adapter_for(model.config).blocks(model)[0]
    hooks = block.get_submodule(ATTENTION)._forward_pre_hooks.values()
    return next((hook.bits for hook in hooks if isinstance(hook, _Hook)), UNROUNDED)
