"""Running a model one block at a time, and seeing what enters its linears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saltire.models.adapters import Adapter


class _Captured(Exception):  # noqa: N818  (not an error: it ends a forward pass that has done its job)
    """Raised by a hook once it has what it wants."""


class BlockRunner:
    """Holds the hidden states of the calibration text and takes them through block after block.

    hidden: one float [b, T, D] per batch, the input of the block that comes next. Every batch has
    the same shape, so what else a block takes (positions, masks) is captured once.
    """

    def __init__(
        self, model: PreTrainedModel, adapter: Adapter, tokens: Tensor, batch: int
    ) -> None:
        """tokens: int64 [samples, T]; batch: samples in one forward pass, dividing ``samples``."""
        self.hidden: list[Tensor] = []
        self._arguments: Mapping[str, Any] = {}
        first = adapter.blocks(model)[0]

        def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hidden.append(args[0] if args else kwargs.pop("hidden_states"))
            self._arguments = kwargs
            raise _Captured

        handle = first.register_forward_pre_hook(capture, with_kwargs=True)
        try:
            for chunk in tokens.split(batch):
                _run_until_captured(lambda chunk=chunk: model(chunk, use_cache=False))  # type: ignore[misc]
        finally:
            handle.remove()

    def inputs_of(self, block: nn.Module, linear: str) -> Tensor:
        """What enters one linear of the block, over all batches: float32 [tokens, K].

        The linears before it run as they are, so those already quantised show their errors.
        """
        seen: list[Tensor] = []

        def capture(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].detach().flatten(0, -2).float())
            raise _Captured

        handle = block.get_submodule(linear).register_forward_pre_hook(capture)
        try:
            for hidden in self.hidden:
                _run_until_captured(lambda hidden=hidden: block(hidden, **self._arguments))  # type: ignore[misc]
        finally:
            handle.remove()
        return torch.cat(seen)

    def outputs(self, norm: nn.Module) -> Tensor:
        """The hidden states after all blocks and the final norm: float32 [tokens, D]."""
        return torch.cat([norm(hidden).flatten(0, -2).float() for hidden in self.hidden])

    def advance(self, block: nn.Module) -> None:
        """Take the hidden states through the block."""
        for index, hidden in enumerate(self.hidden):
            out = block(hidden, **self._arguments)
            self.hidden[index] = out[0] if isinstance(out, tuple) else out


def _run_until_captured(forward: Callable[[], object]) -> None:
    try:
        forward()
    except _Captured:
        return
    raise RuntimeError("the forward pass ended without reaching the layer that was asked for")
