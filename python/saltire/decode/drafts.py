"""Where drafts come from: a cheaper form of the model, or the text itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from saltire import ops
from saltire.decode.sampling import Sampling
from saltire.errors import SaltireError
from saltire.nn.decoder import Decoder
from saltire.nn.kv_cache import KVCache


@dataclass
class Proposal:
    """tokens: one list for each sequence. q: f32 [all tokens, V], sequence after sequence, what
    each was drawn from; None where drafts are certain (n-grams, greedy)."""

    tokens: list[list[int]]
    q: Tensor | None = None


class Draft(Protocol):
    """Proposes what may come next; leaves the cache's committed lengths as they are."""

    def propose(
        self,
        cache: KVCache,
        texts: Sequence[Sequence[int]],
        room: Sequence[int],
        sampling: Sampling,
    ) -> Proposal:
        """texts: the tokens of each sequence so far; the last is not yet in the cache. room: the
        most drafts wanted for each, 0 for a sequence that has ended."""


@dataclass
class ModelDraft:
    """A cheaper form of the target: layers skipped (``units``), fewer bits (``decoder``), or both.

    It reads the target's cache and writes behind the committed length, where verification
    overwrites it: so its decoder must have the target's layers and heads. confidence: a draft
    whose own probability is lower is kept and is the last of its round. Source: CLaSp, section 3;
    dropping that token instead would bias the output.
    """

    decoder: Decoder
    units: Tensor | None = None
    confidence: float = 0.4

    def check(self, target: Decoder) -> None:
        """Raise SaltireError unless this draft can share the target's cache and tokens."""
        ours, theirs = self.decoder.sizes, target.sizes
        if ours.vocabulary != theirs.vocabulary:
            raise SaltireError(
                f"the draft's vocabulary has {ours.vocabulary} tokens, the target's "
                f"{theirs.vocabulary}; they must be the same. Draft with a form of the same model."
            )
        cache = (self.decoder.layers, ours.kv_heads, ours.head_dim)
        if cache != (target.layers, theirs.kv_heads, theirs.head_dim):
            raise SaltireError(
                "the draft's layers and heads differ from the target's; they share one cache. "
                "Draft with a form of the same model."
            )

    def propose(
        self,
        cache: KVCache,
        texts: Sequence[Sequence[int]],
        room: Sequence[int],
        sampling: Sampling,
    ) -> Proposal:
        tokens: list[list[int]] = [[] for _ in texts]
        rows_of: list[list[Tensor]] = [[] for _ in texts]
        active = [b for b, count in enumerate(room) if count > 0]
        while active:
            rows, histories = [], []
            for b in active:
                text, drafted = texts[b], tokens[b]
                slot = cache.lengths[b] + len(drafted)
                token = drafted[-1] if drafted else text[-1]
                rows.append([token, b, slot, slot, slot + 1, 0])
                if sampling.repetition_penalty != 1.0:
                    histories.append([*text, *drafted])
            result = self.decoder.step_rows(cache, rows, range(len(rows)), self.units)
            if sampling.repetition_penalty != 1.0:
                sampling.penalise(result.logits, histories)
            if sampling.greedy:
                chosen, sure = result.best, result.share
                if sampling.repetition_penalty != 1.0:
                    chosen = result.logits.argmax(-1)
            else:
                q = sampling.probabilities(result.logits)
                positions = torch.tensor([len(texts[b]) + len(tokens[b]) for b in active])
                chosen = ops.draw_tokens(
                    q, torch.tensor(active), positions, sampling.seed, draft=True
                )
                sure = q.gather(1, chosen[:, None])[:, 0]
                for row, b in zip(q, active, strict=True):
                    rows_of[b].append(row)
            for b, token in zip(active, chosen.tolist(), strict=True):
                tokens[b].append(token)
            active = [
                b
                for b, share in zip(active, sure.tolist(), strict=True)
                if len(tokens[b]) < room[b] and share >= self.confidence
            ]
        drawn = [row for rows in rows_of for row in rows]
        return Proposal(tokens, torch.stack(drawn) if drawn else None)


@dataclass
class NgramDraft:
    """What followed the last time that the text's last tokens came up (prompt lookup).

    longest: the longest run of tokens that is looked up first. The index of a text grows with it,
    so a proposal costs a few look-ups however long the text is.
    """

    longest: int = 3
    shortest: int = 2
    _index: dict[int, tuple[list[int], dict[tuple[int, ...], int]]] = field(default_factory=dict)

    def matched(self, sequence: int, text: Sequence[int]) -> int:
        """Where the continuation of the longest match starts in the text; 0 if there is none."""
        known, places = self._index.get(sequence, ([], {}))
        if list(text[: len(known)]) != known:
            known, places = [], {}
        # The run that ends the text itself is not entered: it would be its own match.
        for end in range(len(known), len(text)):
            for n in range(self.shortest, self.longest + 1):
                if end >= n:
                    places[tuple(text[end - n : end])] = end
        self._index[sequence] = (list(text), places)
        for n in range(min(self.longest, len(text)), self.shortest - 1, -1):
            place = places.get(tuple(text[len(text) - n :]))
            if place is not None:
                return place
        return 0

    def propose(
        self,
        cache: KVCache,
        texts: Sequence[Sequence[int]],
        room: Sequence[int],
        sampling: Sampling,
    ) -> Proposal:
        tokens = []
        for b, (text, count) in enumerate(zip(texts, room, strict=True)):
            place = self.matched(b, text) if count else 0
            tokens.append(list(text[place : place + count]) if place else [])
        return Proposal(tokens)
