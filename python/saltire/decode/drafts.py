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
from saltire.ops.decoder_layer import CONFIDENCE_BINS


@dataclass
class Proposal:
    """tokens: one list for each sequence. shares: the probability that the draft itself gave each
    of them; empty where it has none. q: f32 [all tokens, V], sequence after sequence, what each was
    drawn from; None where drafts are certain (n-grams, greedy)."""

    tokens: list[list[int]]
    shares: list[list[float]] = field(default_factory=list)
    q: Tensor | None = None


@dataclass(frozen=True)
class Guide:
    """room: the most drafts wanted for each sequence, 0 for one that has ended. survival, worth: a
    model stops drafting where the chance that all of a round stands, a product of survival f32
    [CONFIDENCE_BINS], falls below worth."""

    room: Sequence[int]
    worth: float = 0.0
    survival: Tensor = field(default_factory=lambda: torch.ones(CONFIDENCE_BINS))


class Draft(Protocol):
    """Proposes what may come next; leaves the cache's committed lengths as they are."""

    def propose(
        self,
        cache: KVCache,
        texts: Sequence[Sequence[int]],
        guide: Guide,
        sampling: Sampling,
    ) -> Proposal:
        """texts: the tokens of each sequence so far; the last is not yet in the cache."""


@dataclass
class ModelDraft:
    """A cheaper form of the target: layers skipped (``units``), fewer bits (``decoder``), or both.

    It reads the target's cache and writes behind the committed length, where verification
    overwrites it: so its decoder must have the target's layers and heads. confidence: a draft
    whose own probability is lower is kept and is the last of its round. Source: CLaSp, section 3;
    dropping that token instead would bias the output. vocabulary: greedy drafts are the best of the
    first so many tokens; 0: of all. Byte-pair tokens are numbered as they were merged, the most
    frequent first, so the first third holds nearly all that a text uses.
    """

    decoder: Decoder
    units: Tensor | None = None
    confidence: float = 0.0
    vocabulary: int = 0

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
        guide: Guide,
        sampling: Sampling,
    ) -> Proposal:
        if not sampling.greedy or sampling.repetition_penalty != 1.0:
            return self._draw(cache, texts, guide, sampling)
        starts = [
            [text[-1], b, cache.lengths[b], most]
            for b, (text, most) in enumerate(zip(texts, guide.room, strict=True))
        ]
        tokens, shares = self.decoder.draft(
            cache,
            starts,
            guide.survival,
            self.units,
            self.confidence,
            guide.worth,
            self.vocabulary,
        )
        return Proposal(tokens, shares)

    def _draw(
        self,
        cache: KVCache,
        texts: Sequence[Sequence[int]],
        guide: Guide,
        sampling: Sampling,
    ) -> Proposal:
        """Step by step, each token drawn from the draft's own warped distribution."""
        tokens: list[list[int]] = [[] for _ in texts]
        shares: list[list[float]] = [[] for _ in texts]
        rows_of: list[list[Tensor]] = [[] for _ in texts]
        chance = [1.0] * len(texts)
        survival = guide.survival.tolist()
        active = [b for b, count in enumerate(guide.room) if count > 0]
        while active:
            rows, histories = [], []
            for b in active:
                slot = cache.lengths[b] + len(tokens[b])
                rows.append([(tokens[b] or texts[b])[-1], b, slot, slot, slot + 1, 0])
                histories.append([*texts[b], *tokens[b]])
            result = self.decoder.step_rows(cache, rows, range(len(rows)), self.units)
            logits = sampling.penalise(result.logits.cpu(), histories)
            if sampling.greedy:
                chosen, sure = logits.argmax(-1), result.share
            else:
                q = sampling.probabilities(logits)
                positions = torch.tensor([len(history) for history in histories])
                chosen = ops.draw_tokens(
                    q, torch.tensor(active), positions, sampling.seed, draft=True
                )
                sure = q.gather(1, chosen[:, None])[:, 0]
                for row, b in zip(q, active, strict=True):
                    rows_of[b].append(row)
            going = []
            for b, token, share in zip(active, chosen.tolist(), sure.tolist(), strict=True):
                tokens[b].append(token)
                shares[b].append(share)
                chance[b] *= survival[confidence_bin(share)]
                more = len(tokens[b]) < guide.room[b] and share >= self.confidence
                if more and chance[b] >= guide.worth:
                    going.append(b)
            active = going
        drawn = [row for rows in rows_of for row in rows]
        return Proposal(tokens, shares, torch.stack(drawn) if drawn else None)


def confidence_bin(share: float) -> int:
    """The bin of a draft's own probability."""
    return min(max(int(share * CONFIDENCE_BINS), 0), CONFIDENCE_BINS - 1)


@dataclass
class NgramDraft:
    """What followed the last time that the text's last tokens came up (prompt lookup).

    Of the ``candidates`` latest places where the last ``shortest`` tokens stand, the one that
    matches furthest back; of equals the latest. The index of a text grows with it, so a proposal
    costs a few look-ups however long the text is.
    """

    shortest: int = 2
    longest: int = 16
    candidates: int = 16
    _index: dict[int, tuple[list[int], dict[tuple[int, ...], list[int]]]] = field(
        default_factory=dict
    )

    def matched(self, sequence: int, text: Sequence[int]) -> tuple[int, int]:
        """Where the continuation of the longest match starts in the text, and how many tokens
        match; (0, 0) if there is none."""
        known, places = self._index.get(sequence, ([], {}))
        if len(known) > len(text) or list(text[: len(known)]) != known:
            known, places = [], {}
        # The run that ends the text itself is not entered: it would be its own match.
        for end in range(max(len(known), self.shortest), len(text)):
            places.setdefault(tuple(text[end - self.shortest : end]), []).append(end)
        known.extend(text[len(known) :])
        self._index[sequence] = (known, places)
        best, run = 0, 0
        for place in reversed(places.get(tuple(text[-self.shortest :]), [])[-self.candidates :]):
            length = self.shortest
            most = min(self.longest, place)
            while length < most and text[place - 1 - length] == text[-1 - length]:
                length += 1
            if length > run:
                best, run = place, length
        return best, run

    def propose(
        self,
        cache: KVCache,
        texts: Sequence[Sequence[int]],
        guide: Guide,
        sampling: Sampling,
    ) -> Proposal:
        tokens = []
        for b, (text, count) in enumerate(zip(texts, guide.room, strict=True)):
            place, _ = self.matched(b, text) if count else (0, 0)
            period = len(text) - place  # a text that repeats itself goes on past its own end
            tokens.append([text[place + i % period] for i in range(count)] if place else [])
        return Proposal(tokens)
