"""Writers: what a model agent writes with; prompts go in one by one, completions come out as they
end, and all that are under way share one batch of generation.

What is written is decided by uniform numbers that come with the prompt, so that a match does not
depend on which others are in flight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from saltire.rl.rollout import Rollout

Key = tuple[int, int]  # (match, player): whose context it is


@dataclass(frozen=True)
class Draft:
    """A prompt to be continued. uniforms: f64 [T], one number for each token of at most T."""

    key: Key
    prompt: list[int]
    uniforms: Tensor
    temperature: float


class Writer(Protocol):
    """Continues prompts in batches."""

    @property
    def positions(self) -> int:
        """The longest prompt with its completion."""
        ...

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        ...

    def submit(self, draft: Draft) -> None:
        """Take a prompt; no other of its key may be under way."""
        ...

    def advance(self) -> list[tuple[Key, list[int]]]:
        """Work for a while; completions that have ended, with their stop token."""
        ...

    def forget(self, match: int) -> None:
        """The match is over: its contexts are of no more use."""
        ...


class RolloutWriter:
    """Everything that waits, in one call of a :class:`Rollout`: transformers, on any device."""

    def __init__(self, rollout: Rollout, positions: int) -> None:
        self.rollout, self.positions = rollout, positions
        self._waiting: list[Draft] = []

    @property
    def busy(self) -> bool:
        """See :class:`Writer`."""
        return bool(self._waiting)

    def submit(self, draft: Draft) -> None:
        """See :class:`Writer`."""
        self._waiting.append(draft)

    def advance(self) -> list[tuple[Key, list[int]]]:
        """See :class:`Writer`."""
        drafts, self._waiting = self._waiting, []
        done: list[tuple[Key, list[int]]] = []
        for temperature in sorted({draft.temperature for draft in drafts}):
            some = [draft for draft in drafts if draft.temperature == temperature]
            uniforms = torch.stack([draft.uniforms for draft in some])
            completions = self.rollout([draft.prompt for draft in some], uniforms, temperature)
            done += [(d.key, c) for d, c in zip(some, completions, strict=True)]
        return done

    def forget(self, match: int) -> None:
        """See :class:`Writer`."""
        self._waiting = [draft for draft in self._waiting if draft.key[0] != match]
