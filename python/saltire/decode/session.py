"""A decoder with its drafts, ready to generate."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from saltire.decode.chooser import Arm, Chooser
from saltire.decode.drafts import Draft, ModelDraft
from saltire.decode.generation import Generation, Run
from saltire.decode.plan import SkipPlanner
from saltire.decode.sampling import Sampling
from saltire.errors import SaltireError
from saltire.nn.decoder import Decoder

LONGEST = 8  # drafts of a round


class Session:
    """A decoder with its drafts; what is learnt about them is kept from one text to the next.

    drafts: by name; empty is plain decoding. planner: makes the plans of ``planned`` drafts (by
    name, the number of skipped layers), first from the prefill, then every ``interval``-th
    verification. Source: CLaSp, section 3.
    """

    def __init__(
        self,
        decoder: Decoder,
        drafts: Mapping[str, Draft] | None = None,
        planner: SkipPlanner | None = None,
        planned: Mapping[str, int] | None = None,
        interval: int = 64,
        cache_dtype: torch.dtype | None = None,
        fixed: int = 0,
    ) -> None:
        """fixed: with one draft, always draft so many; 0 lets the chooser decide."""
        self.decoder, self.drafts = decoder, dict(drafts or {})
        self.planner, self.planned = planner, dict(planned or {})
        self.interval, self.cache_dtype, self.fixed = interval, cache_dtype, fixed
        for draft in self.drafts.values():
            if isinstance(draft, ModelDraft):
                draft.check(decoder)
        self._choosers: dict[int, Chooser] = {}

    def chooser(self, sequences: int) -> Chooser:
        """What is known of the drafts with about so many sequences at once: a step's time by its
        rows depends on it."""
        size = sequences.bit_length()
        if size not in self._choosers:
            arms = {name: Arm(LONGEST, self._cost(name)) for name in self.drafts}
            self._choosers[size] = Chooser(arms)
        return self._choosers[size]

    def _cost(self, name: str) -> float:
        """A guess of a drafted token's time over a plain step's: the share of its bytes."""
        draft = self.drafts[name]
        if not isinstance(draft, ModelDraft):
            return 0.0
        steps = self.decoder.layers * (2 if self.planner and self.planner.halves else 1)
        kept = 1.0 - self.planned.get(name, 0) / steps
        return kept * draft.decoder.read_bytes / self.decoder.read_bytes

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        on_tokens: Callable[[int, list[int]], bool | None] | None = None,
    ) -> Generation:
        """Continue each prompt (lists of token ids) by up to ``max_new_tokens``.

        stop: tokens that end a sequence. on_tokens: called with (sequence, its new tokens) as they
        come; returning True ends that sequence. KeyboardInterrupt ends the generation and keeps
        what there is. Raises SaltireError for an empty prompt or one that does not fit.
        """
        if max_new_tokens < 0:
            raise SaltireError(f"max_new_tokens = {max_new_tokens}; expected 0 or more.")
        for b, prompt in enumerate(prompts):
            if not prompt:
                raise SaltireError(f"prompt {b} is empty; expected at least one token.")
        if self.drafts:
            self.decoder.verify_rows(len(prompts) * (LONGEST + 1))
        run = Run(self, prompts, max_new_tokens, sampling or Sampling(), set(stop), on_tokens)
        if max_new_tokens == 0 or not prompts:
            return run.out
        start = time.perf_counter()
        try:
            run.prefill()
            while any(run.active):
                run.round()
        except KeyboardInterrupt:
            run.out.interrupted = True
        run.out.stats.total_seconds = time.perf_counter() - start
        return run.out
