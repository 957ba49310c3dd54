"""Running a model one block at a time, and seeing what enters its linears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from saltire.models.adapters import Adapter, Part
from saltire.quant.activations import ActivationFile


class _Captured(Exception):  # noqa: N818  (not an error: it ends a forward pass that has done its job)
    """Raised by a hook once it has what it wants."""


class BlockRunner:
    """Holds the hidden states of the calibration text and takes them through block after block.

    The states, the input of the block that comes next, lie in a memory-mapped file; a second one
    takes the outputs, so that a run that is killed still has the inputs. Every batch has the same
    shape, so what else a block takes (positions, masks) is captured once.

    What enters the last linear of a part (attention, MLP) is kept, so that later passes over the
    same block begin with that linear instead of computing the part again: attention is computed
    once a block, not four times.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        adapter: Adapter,
        tokens: Tensor,
        batch: int,
        *,
        files: tuple[Path, Path] | None = None,
        start: int = 0,
    ) -> None:
        """tokens: int64 [samples, T]; batch: samples in one forward pass, dividing ``samples``.
        files: where to keep the states of even and of odd blocks (default: nowhere for long).
        start: the block whose inputs ``files`` holds from a run before. Raises SaltireError if the
        file of them is missing or not of its size."""
        chunks = tokens.split(batch)
        self._parts = adapter.parts
        self._kept: dict[Part, ActivationFile] = {}
        self._arguments: Mapping[str, Any] = {}
        self._at = start
        first, self._arguments = _block_inputs(model, adapter, chunks[0])
        self.dtype = first.dtype
        shape = tuple(first.shape)
        self._files = [
            ActivationFile(
                len(chunks),
                shape,
                None if files is None else files[side],
                whole=start > 0 and side == start % 2,
            )
            for side in (0, 1)
        ]
        for index, chunk in enumerate(chunks if start == 0 else ()):
            state = first if index == 0 else _block_inputs(model, adapter, chunk)[0]
            self.hidden[index] = state.float()

    @property
    def hidden(self) -> ActivationFile:
        """The input of the block that comes next, batch by batch: float32 [b, T, D]."""
        return self._files[self._at % 2]

    def run(self, block: nn.Module, batch: int) -> Tensor:
        """The block's output on one batch of its input, [b, T, D] in the model's dtype."""
        out = block(self.hidden[batch].to(self.dtype), **self._arguments)
        return out[0] if isinstance(out, tuple) else out

    def inputs_of(self, block: nn.Module, linear: str) -> Tensor:
        """What enters one linear of the block, over all batches: float32 [tokens, K], mapped from a
        file.

        The linears before it run as they are, so those already quantised show their errors. A
        caller who then changes another linear of the same part calls ``forget``.
        """
        place = [linear.startswith(f"{part.path}.") for part in self._parts].index(True)
        for part in self._parts[place:]:
            self._kept.pop(part, None)
        seen: list[ActivationFile] = []
        batch = 0

        def capture(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach().flatten(0, -2)
            if not seen:
                seen.append(ActivationFile(len(self.hidden), tuple(x.shape)))
            seen[0][batch] = x.float()
            raise _Captured

        handle = block.get_submodule(linear).register_forward_pre_hook(capture)
        try:
            for batch in range(len(self.hidden)):
                with self._replaying(block, batch):
                    _run_until_captured(partial(self.run, block, batch))
        finally:
            handle.remove()
        if self._parts[place].end == linear:
            self._kept[self._parts[place]] = seen[0]
        return seen[0].all().flatten(0, 1)

    def forget(self) -> None:
        """Compute all of the block again, as linears have changed behind ``inputs_of``'s back."""
        self._kept.clear()

    @contextmanager
    def _replaying(self, block: nn.Module, batch: int) -> Iterator[None]:
        """Let the parts that are kept begin with their last linear."""
        replaced = []
        for part, kept in self._kept.items():
            x = kept[batch].unflatten(0, self.hidden.shape[:2]).to(self.dtype)
            module, end = block.get_submodule(part.path), block.get_submodule(part.end)
            module.forward = partial(_replay, part, end, x)
            replaced.append(module)
        try:
            yield
        finally:
            for module in replaced:
                del module.forward

    def outputs(self, norm: nn.Module) -> Tensor:
        """The hidden states after all blocks and the final norm: float32 [tokens, D], mapped."""
        _, T, D = self.hidden.shape
        normed = ActivationFile(len(self.hidden), (self.hidden.shape[0] * T, D))
        for index in range(len(self.hidden)):
            normed[index] = norm(self.hidden[index].to(self.dtype)).flatten(0, -2).float()
        return normed.all().flatten(0, 1)

    def advance(self, block: nn.Module) -> None:
        """Take the hidden states through the block."""
        after = self._files[(self._at + 1) % 2]
        for index in range(len(self.hidden)):
            with self._replaying(block, index):
                after[index] = self.run(block, index).float()
        self.forget()
        self._at += 1

    def flush(self) -> None:
        """Return once the states are on the disk."""
        self.hidden.flush()


def _block_inputs(
    model: PreTrainedModel, adapter: Adapter, tokens: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """What enters the first block: hidden states [b, T, D], and whatever else it takes."""
    seen: list[tuple[Tensor, dict[str, Any]]] = []

    def capture(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
        raise _Captured

    handle = adapter.blocks(model)[0].register_forward_pre_hook(capture, with_kwargs=True)
    try:
        _run_until_captured(lambda: model(tokens, use_cache=False))
    finally:
        handle.remove()
    return seen[0]


def _replay(part: Part, end: nn.Module, x: Tensor, *_: Any, **__: Any) -> Any:
    """What a part returns, given what enters its last linear."""
    y = end(x)
    return (y, None) if part.gives_weights else y


def _run_until_captured(forward: Callable[[], object]) -> None:
    try:
        forward()
    except _Captured:
        return
    raise RuntimeError("the forward pass ended without reaching the layer that was asked for")
