"""Generating with one decoder: prefill, then rounds of draft and verification.

A round: the chosen draft proposes, one step of the target verifies all proposals of all sequences
at once, and what is accepted is committed by setting the cache's lengths. Verification computes
exactly the rows that plain decoding would, bit for bit, so greedy output is the plain output; with
sampling the accepted tokens have the target's own distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saltire import ops
from saltire.decode.chooser import Arm, Chooser
from saltire.decode.drafts import Draft, ModelDraft, NgramDraft, Proposal
from saltire.decode.plan import Plan, SkipPlanner
from saltire.decode.sampling import Sampling
from saltire.decode.stats import DecodeStats
from saltire.errors import SaltireError
from saltire.nn.decoder import Decoder, StepResult
from saltire.nn.kv_cache import KVCache

LONGEST = {"ngram": 8}  # drafts of a round; model drafts: LONGEST_MODEL
LONGEST_MODEL = 8
GUESS = {"ngram": 0.4}  # survival of a drafted token before any was seen
GUESS_MODEL = 0.7


@dataclass
class Generation:
    """tokens: the new ones of each prompt, a stop token included. drafted: for each new token
    whether it was an accepted draft. rejected: for each sequence, the drafts that were refused, as
    (place among the new tokens, token). plans: skipped layers over time."""

    tokens: list[list[int]]
    stats: DecodeStats
    drafted: list[list[bool]] = field(default_factory=list)
    rejected: list[list[tuple[int, int]]] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    interrupted: bool = False


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
        self.chooser = Chooser(
            {
                name: Arm(LONGEST.get(name, LONGEST_MODEL), GUESS.get(name, GUESS_MODEL))
                for name in self.drafts
            }
        )

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
        run = _Run(self, prompts, max_new_tokens, sampling or Sampling(), set(stop), on_tokens)
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


class _Run:
    """The state of one generation."""

    def __init__(
        self,
        session: Session,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling,
        stop: set[int],
        on_tokens: Callable[[int, list[int]], bool | None] | None,
    ) -> None:
        self.session, self.decoder, self.sampling = session, session.decoder, sampling
        self.stop, self.on_tokens, self.budget = stop, on_tokens, max_new_tokens
        self.texts = [list(prompt) for prompt in prompts]
        self.active = [True] * len(self.texts)
        self.out = Generation(
            [[] for _ in prompts], DecodeStats(), [[] for _ in prompts], [[] for _ in prompts]
        )
        self.out.stats.prompt_tokens = sum(len(prompt) for prompt in prompts)
        self.since_plan = 0
        if prompts and max_new_tokens:
            longest = max(len(prompt) for prompt in prompts)
            slots = longest + max_new_tokens
            positions = self.decoder.sizes.positions
            if slots > positions:
                raise SaltireError(
                    f"the longest prompt has {longest} tokens and {max_new_tokens} more are asked "
                    f"for; the model has {positions} positions. Shorten one of them."
                )
            self.cache: KVCache = self.decoder.new_cache(len(prompts), slots, session.cache_dtype)

    # --- prefill ------------------------------------------------------------------------------

    def prefill(self) -> None:
        start = time.perf_counter()
        planner = self.session.planner
        trace = planner.trace(len(self.texts)) if planner else None
        result = self.decoder.prefill(self.cache, self.texts, trace=trace)
        ends = [len(text) - 1 for text in self.texts]
        counts = [0] * len(self.texts)
        accepted, following = self._judge(result, Proposal([[] for _ in self.texts]), counts)
        self.out.stats.prefill_seconds = time.perf_counter() - start
        if trace is not None:
            self._plan(0, ends[0], trace[:, 0])
        for b, token in enumerate(following):
            self._emit(b, [token], accepted[b])

    # --- one round ----------------------------------------------------------------------------

    def round(self) -> None:
        session, stats = self.session, self.out.stats
        room = [
            min(self.budget - len(self.out.tokens[b]) - 1, LONGEST_MODEL) if alive else 0
            for b, alive in enumerate(self.active)
        ]
        name, length = self._choose(max(room, default=0))
        proposal = Proposal([[] for _ in self.texts])
        draft_seconds = 0.0
        if length > 0:
            start = time.perf_counter()
            wanted = [min(count, length) for count in room]
            proposal = session.drafts[name].propose(self.cache, self.texts, wanted, self.sampling)
            draft_seconds = time.perf_counter() - start
        start = time.perf_counter()
        tokens = [
            [self.texts[b][-1], *proposal.tokens[b]] if alive else []
            for b, alive in enumerate(self.active)
        ]
        rows = sum(len(some) for some in tokens)
        planner = session.planner
        due = planner is not None and self.since_plan + 1 >= session.interval
        trace = planner.trace(rows) if planner is not None and due else None
        result = self.decoder.step(self.cache, tokens, trace=trace, commit=False)
        counts = [len(some) - 1 for some in tokens]
        accepted, following = self._judge(result, proposal, counts)
        verify_seconds = time.perf_counter() - start
        self.since_plan += 1
        stats.steps += 1
        stats.draft_seconds += draft_seconds
        stats.verify_seconds += verify_seconds
        offered = sum(len(some) for some in proposal.tokens)
        stats.rounds[name if offered else "none"] += 1
        alive_count = sum(self.active)
        session.chooser.saw_step(max(1, round(rows / alive_count)), verify_seconds)
        if length > 0:
            for b, alive in enumerate(self.active):
                if alive:
                    session.chooser.saw_draft(
                        name, len(proposal.tokens[b]), accepted[b], draft_seconds / alive_count
                    )
        if trace is not None:
            self._replan(counts, accepted, trace)
        for b, alive in enumerate(list(self.active)):
            if alive:
                self._commit(b, proposal.tokens[b], accepted[b], following[b])

    def _choose(self, most: int) -> tuple[str, int]:
        session = self.session
        available = {}
        for name, draft in session.drafts.items():
            count = most
            if isinstance(draft, NgramDraft):
                found = [
                    draft.matched(b, text) for b, text in enumerate(self.texts) if self.active[b]
                ]
                count = most if any(found) else 0
            if name in session.planned and not self.out.plans:
                count = 0
            available[name] = count
        if session.fixed and available:
            name = next((n for n, count in available.items() if count), "none")
            return name, min(session.fixed, available.get(name, 0))
        return session.chooser.choose(available)

    def _judge(
        self, result: StepResult, proposal: Proposal, counts: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """How many drafts of each sequence stand, and the token behind them."""
        sampling, logits = self.sampling, result.logits
        alive = [b for b, on in enumerate(self.active) if on]
        if sampling.repetition_penalty != 1.0:
            histories = [
                [*self.texts[b], *proposal.tokens[b][:i]]
                for b in alive
                for i in range(counts[b] + 1)
            ]
            logits = sampling.penalise(logits, histories)
        accepted, following = [0] * len(self.texts), [0] * len(self.texts)
        if sampling.greedy:
            best = result.best if sampling.repetition_penalty == 1.0 else logits.argmax(-1)
            choices, row = best.tolist(), 0
            for b in alive:
                drafts = proposal.tokens[b]
                n = 0
                while n < len(drafts) and drafts[n] == choices[row + n]:
                    n += 1
                accepted[b], following[b] = n, choices[row + n]
                row += counts[b] + 1
            return accepted, following
        flat = [token for b in alive for token in proposal.tokens[b]]
        stands, behind = ops.speculate_verify(
            sampling.probabilities(logits),
            proposal.q,
            torch.tensor(flat, dtype=torch.int64),
            torch.tensor([counts[b] for b in alive]),
            torch.tensor(alive),
            torch.tensor([len(self.texts[b]) for b in alive]),
            sampling.seed,
        )
        for b, n, token in zip(alive, stands.tolist(), behind.tolist(), strict=True):
            accepted[b], following[b] = n, token
        return accepted, following

    def _commit(self, b: int, drafts: list[int], accepted: int, following: int) -> None:
        stats = self.out.stats
        for i in range(min(len(drafts), accepted + 1)):
            stats.offered[i] += 1
            stats.accepted[i] += i < accepted
        if accepted < len(drafts):
            place = len(self.out.tokens[b]) + accepted
            self.out.rejected[b].append((place, drafts[accepted]))
        self.cache.lengths[b] += 1 + accepted
        self._emit(b, [*drafts[:accepted], following], accepted)

    def _emit(self, b: int, tokens: list[int], accepted: int) -> None:
        """Append tokens to a sequence, up to a stop token; call back."""
        for place, token in enumerate(tokens):
            if token in self.stop:
                tokens = tokens[: place + 1]
                break
        self.texts[b].extend(tokens)
        self.out.tokens[b].extend(tokens)
        self.out.drafted[b].extend(i < accepted for i in range(len(tokens)))
        self.out.stats.new_tokens += len(tokens)
        ended = tokens[-1] in self.stop or len(self.out.tokens[b]) >= self.budget
        if self.on_tokens is not None and self.on_tokens(b, tokens):
            ended = True
        if ended:
            self.active[b] = False

    # --- plans --------------------------------------------------------------------------------

    def _replan(self, counts: Sequence[int], accepted: Sequence[int], trace: Tensor) -> None:
        """From the last verified token of the first sequence that still runs."""
        b = next(b for b, alive in enumerate(self.active) if alive)
        row = accepted[b]  # sequences before b have no rows
        self._plan(b, self.cache.lengths[b] + accepted[b], trace[:, row])

    def _plan(self, sequence: int, position: int, states: Tensor) -> None:
        session = self.session
        if session.planner is None:
            return
        start = time.perf_counter()
        plans = session.planner.plans(self.cache, sequence, position, states)
        for name, skipped in session.planned.items():
            draft = session.drafts[name]
            assert isinstance(draft, ModelDraft)
            draft.units = plans[skipped - 1].units
            self.out.plans.append(plans[skipped - 1])
        self.since_plan = 0
        self.out.stats.plans += 1
        self.out.stats.plan_seconds += time.perf_counter() - start
