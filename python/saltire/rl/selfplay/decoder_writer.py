"""The writer on the native decoder: one batch of tokens at a time, caches that outlive a turn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.nn.decoder import Decoder
from saltire.nn.kv_cache import KVCache
from saltire.rl.selfplay.writers import Draft, Key

BLOCK = 256  # entries of the distribution that are summed before the place is looked for
FIRST_SLOTS = 256
WORTH_COPYING = 16  # tokens that another sequence must have more, for its beginning to be copied
WAITING = 4  # prompts are read once a quarter as many wait as there are replies being written


@dataclass
class _Seat:
    """One sequence of the cache. held: the tokens whose keys and values it has."""

    key: Key | None = None
    held: list[int] = field(default_factory=list)
    draft: Draft | None = None
    written: list[int] = field(default_factory=list)
    used: int = 0


class DecoderWriter:
    """The native decoder, with a cache that outlives a turn: only what a prompt adds to the last
    one of its key is computed, and a newcomer joins the batch that is under way.

    stop: tokens that end a completion. sequences: contexts kept at once; where there are more, the
    one unused for longest is computed again when its turn comes.
    """

    def __init__(
        self,
        decoder: Decoder,
        stop: list[int],
        sequences: int = 64,
        cache_dtype: torch.dtype = torch.float32,
    ) -> None:
        if not stop:
            raise SaltireError(
                "the tokenizer has no end-of-sequence token, so no reply would end. Set one."
            )
        if sequences < 1:
            raise SaltireError(f"sequences = {sequences}; expected at least 1.")
        self.decoder, self.stop, self.dtype = decoder, set(stop), cache_dtype
        self.positions = decoder.sizes.positions
        self._seats = [_Seat() for _ in range(sequences)]
        self._queue: list[Draft] = []
        self._cache: KVCache | None = None
        self._clock = 0
        self.computed = 0  # prompt tokens that went through the model
        self.reused = 0  # prompt tokens that the cache already had

    @property
    def busy(self) -> bool:
        """See :class:`Writer`."""
        return bool(self._queue) or any(seat.draft is not None for seat in self._seats)

    def submit(self, draft: Draft) -> None:
        """See :class:`Writer`."""
        if not draft.prompt:
            raise SaltireError("a prompt is empty; it needs at least one token.")
        self._queue.append(draft)

    def forget(self, match: int) -> None:
        """See :class:`Writer`."""
        self._queue = [draft for draft in self._queue if draft.key[0] != match]
        for seat in self._seats:
            if seat.key is not None and seat.key[0] == match:
                seat.key, seat.draft = None, None

    def restart(self) -> None:
        """The weights have changed: nothing that was computed holds any more."""
        for seat in self._seats:
            seat.key, seat.held, seat.draft = None, [], None
        self._queue.clear()

    @torch.no_grad()
    def advance(self) -> list[tuple[Key, list[int]]]:
        """One token for everything under way. See :class:`Writer`."""
        self._admit()
        running = [(b, seat) for b, seat in enumerate(self._seats) if seat.draft and seat.written]
        cache = self._cache
        if running and cache is not None:
            tokens: list[list[int]] = [[] for _ in self._seats]
            for b, seat in running:
                tokens[b] = [seat.written[-1]]
            result = self.decoder.step(cache, tokens)
            for _, seat in running:
                seat.held.append(seat.written[-1])
            self._draw([seat for _, seat in running], result.logits)
        done = []
        for seat in self._seats:
            draft = seat.draft
            if draft is None or not seat.written:
                continue
            if seat.written[-1] in self.stop or len(seat.written) == len(draft.uniforms):
                done.append((draft.key, seat.written))
                seat.draft, seat.written = None, []
        return done

    def _admit(self) -> None:
        """Give waiting prompts a sequence; compute what is new of them, up to their first token."""
        while self._queue and self._worth_it() and (batch := self._seat_batch()):
            cache = self._cache
            assert cache is not None
            new: list[list[int]] = [[] for _ in self._seats]
            for b, prompt in batch.items():
                known = cache.lengths[b]
                new[b] = prompt[known:]
                self.computed += len(new[b])
                self.reused += known
            result = self.decoder.prefill(cache, new)
            for b, prompt in batch.items():
                self._seats[b].held = list(prompt)
            self._draw([self._seats[b] for b in sorted(batch)], result.logits)

    def _worth_it(self) -> bool:
        """Whether to read prompts now. One pass over the weights serves all that wait, so a few
        wait for more to come: with many rows a step takes as long as it has rows, so a place that
        stays empty meanwhile costs little."""
        writing = sum(seat.draft is not None for seat in self._seats)
        return WAITING * len(self._queue) >= writing

    def _seat_batch(self) -> dict[int, list[int]]:
        """Sequences, with their prompts, that can be computed at once; each holds what was known.

        One that begins like another of the batch waits for the next, to begin with a copy of it.
        """
        batch: dict[int, list[int]] = {}
        while self._queue:
            draft = self._queue[0]
            prompt = draft.prompt
            b = self._find(draft.key)
            if b is None:
                break
            seat = self._seats[b]
            kept = min(common(seat.held, prompt), len(prompt) - 1)
            held = {o: one.held for o, one in enumerate(self._seats) if o not in batch}
            other, shared = most_alike(prompt, held)
            if most_alike(prompt, batch)[1] >= max(kept, shared) + WORTH_COPYING:
                break
            cache = self._room(len(prompt) + len(draft.uniforms))
            cache.roll_back(b, kept)
            if shared >= kept + WORTH_COPYING:
                cache.share(other, b, shared)
            self._queue.pop(0)
            self._clock += 1
            seat.key, seat.draft, seat.written, seat.used = draft.key, draft, [], self._clock
            seat.held = prompt[: cache.lengths[b]]
            batch[b] = prompt
        return batch

    def _find(self, key: Key) -> int | None:
        """The sequence of ``key``, else a free one, else the one unused for longest."""
        free: tuple[bool, int, int] | None = None
        for b, seat in enumerate(self._seats):
            if seat.key == key:
                return b
            if seat.draft is None:
                candidate = (seat.key is not None, seat.used, b)
                free = candidate if free is None else min(free, candidate)
        return None if free is None else free[2]

    def _room(self, slots: int) -> KVCache:
        """The cache, grown to ``slots`` if it is smaller; what it holds is kept as it is."""
        old = self._cache
        if old is not None and old.slots >= slots:
            return old
        wanted = max(FIRST_SLOTS, slots, 2 * old.slots if old else 0)
        cache = self.decoder.new_cache(len(self._seats), min(wanted, self.positions), self.dtype)
        if old is not None:
            cache.keep(old)
        self._cache = cache
        return cache

    def _draw(self, seats: list[_Seat], logits: Tensor) -> None:
        """Append a token to each, from its row of ``logits``."""
        drafts = [seat.draft for seat in seats if seat.draft is not None]
        uniforms = torch.stack(
            [draft.uniforms[len(seat.written)] for draft, seat in zip(drafts, seats, strict=True)]
        )
        temperatures = torch.tensor([draft.temperature for draft in drafts])
        for seat, token in zip(seats, draw(logits, uniforms, temperatures).tolist(), strict=True):
            seat.written.append(token)


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # slices compare at the speed of C: halving beats walking
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


def most_alike(prompt: list[int], held: Mapping[int, list[int]]) -> tuple[int, int]:
    """Which of ``held`` begins with most of ``prompt``, and how much, its last token apart: rules
    are the same in all matches of a game, and what has been said is the same for all who play."""
    lengths = {b: common(tokens, prompt) for b, tokens in held.items()}
    other = max(lengths, key=lengths.__getitem__, default=0)
    return other, min(lengths.get(other, 0), len(prompt) - 1)


def draw(logits: Tensor, uniforms: Tensor, temperatures: Tensor) -> Tensor:
    """The token at which the distribution function of softmax(logits / T) passes each uniform.

    logits: f32 [m, V]. uniforms: f64 [m] in [0, 1). temperatures: f32 [m]; 0 takes the largest.
    Returns int64 [m]. The running sum is taken over blocks first, then within one block, both in
    float64: the same as one running sum over all, at a fraction of its cost.
    """
    m, V = logits.shape
    if not bool(logits.amax(dim=-1).isfinite().all()):
        raise SaltireError("the model's logits are not finite; its weights are damaged.")
    greedy = temperatures == 0
    scale = torch.where(greedy, 1.0, temperatures).unsqueeze(1)
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / scale).exp_()
    weights = torch.nn.functional.pad(weights, (0, -V % BLOCK)).view(m, -1, BLOCK)
    sums = weights.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    wanted = (uniforms * sums[:, -1]).unsqueeze(1)
    block = torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inner = weights[torch.arange(m), block.squeeze(1)].double().cumsum(dim=-1)
    # Rounding may put the rest at the block's end; a token without weight must not follow.
    rest = torch.minimum(wanted - before, inner[:, -1:] * (1 - 1e-12)).clamp(min=0)
    place = torch.searchsorted(inner, rest, right=True).clamp(max=BLOCK - 1)
    token = (block * BLOCK + place).squeeze(1)
    return torch.where(greedy, logits.argmax(dim=-1), token)
