"""One generation: prefill, then rounds of draft and verification.

A round: the chosen draft proposes, one step of the target verifies all proposals of all sequences
at once, and what is accepted is committed by setting the cache's lengths. Verification computes
exactly the rows that plain decoding would, bit for bit, so greedy output is the plain output; with
sampling the accepted tokens have the target's own distribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saltire import ops
from saltire.decode.chooser import Choice, Chooser
from saltire.decode.drafts import Guide, ModelDraft, NgramDraft, Proposal
from saltire.decode.plan import Plan
from saltire.decode.sampling import Sampling
from saltire.decode.stats import DecodeStats
from saltire.errors import SaltireError
from saltire.nn.decoder import StepResult
from saltire.nn.kv_cache import KVCache

if TYPE_CHECKING:
    from saltire.decode.session import Session


MOST_AHEAD = 64  # sequences


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


class Run:
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
        # Sequence, position and states of the token to plan from: the prefill's last at first.
        self.traced: tuple[int, int, Tensor] | None = None
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
        counts = [0] * len(self.texts)
        accepted, following = self._judge(result, Proposal([[] for _ in self.texts]), counts)
        self.out.stats.prefill_seconds = time.perf_counter() - start
        if trace is not None:
            self.traced = (0, len(self.texts[0]) - 1, trace[:, 0])
        for b, token in enumerate(following):
            self._emit(b, [token], accepted[b])

    # --- one round ----------------------------------------------------------------------------

    def round(self) -> None:
        session, stats = self.session, self.out.stats
        alive = [b for b, on in enumerate(self.active) if on]
        plain = self.sampling.greedy and self.sampling.repetition_penalty == 1.0
        if plain and not session.drafts and self.decoder.ahead > 1 and len(alive) <= MOST_AHEAD:
            self._run_ahead(alive)
            return
        room = [self.budget - len(tokens) - 1 for tokens in self.out.tokens]
        chooser = session.chooser(len(alive))
        choice, runs = self._choose(chooser, alive, room)
        proposal = Proposal([[] for _ in self.texts])
        draft_seconds = 0.0
        if choice.length > 0:
            if choice.name in session.planned:
                self._plan_if_due()
            start = time.perf_counter()
            wanted = [min(room[b], choice.length) if on else 0 for b, on in enumerate(self.active)]
            guide = Guide(wanted, choice.worth, choice.survival)
            proposal = session.drafts[choice.name].propose(
                self.cache, self.texts, guide, self.sampling
            )
            draft_seconds = time.perf_counter() - start
        start = time.perf_counter()
        tokens = [
            [self.texts[b][-1], *proposal.tokens[b]] if on else []
            for b, on in enumerate(self.active)
        ]
        rows = sum(len(some) for some in tokens)
        trace = self._trace(choice.name, rows)
        result = self.decoder.step(self.cache, tokens, trace=trace, commit=False)
        counts = [len(some) - 1 for some in tokens]
        accepted, following = self._judge(result, proposal, counts)
        verify_seconds = time.perf_counter() - start
        self.since_plan += 1
        stats.steps += 1
        stats.draft_seconds += draft_seconds
        stats.verify_seconds += verify_seconds
        stats.rounds[choice.name if any(proposal.tokens) else "none"] += 1
        chooser.saw_step(max(1, round(rows / len(alive))), verify_seconds)
        if choice.length > 0:
            for b in alive:
                offered, shares = proposal.tokens[b], proposal.shares
                chooser.saw_draft(
                    choice.name,
                    runs.get(b, 0),
                    len(offered),
                    accepted[b],
                    shares[b] if shares else (),
                    draft_seconds,
                    verify_seconds,
                )
        if trace is not None:
            # From the last verified token of the first sequence that runs: no rows are before its.
            b = alive[0]
            self.traced = (b, self.cache.lengths[b] + accepted[b], trace[:, accepted[b]])
        for b in alive:
            self._commit(b, proposal.tokens[b], accepted[b], following[b])

    def _run_ahead(self, alive: list[int]) -> None:
        """Some plain steps before the host sees a token; what lies behind a stop token is lost."""
        start, stats = time.perf_counter(), self.out.stats
        left = min(self.budget - len(self.out.tokens[b]) for b in alive)
        count = min(self.decoder.ahead, left)
        starts = [[self.texts[b][-1], b, self.cache.lengths[b]] for b in alive]
        tokens = self.decoder.run_ahead(self.cache, starts, count)
        stats.steps += count
        stats.rounds["none"] += count
        stats.verify_seconds += time.perf_counter() - start
        for b, some in zip(alive, tokens, strict=True):
            self.cache.lengths[b] += count
            self._emit(b, some, 0)

    def _choose(
        self, chooser: Chooser, alive: list[int], room: list[int]
    ) -> tuple[Choice, dict[int, int]]:
        """A draft, and for one that looks the text up the length of each sequence's match."""
        session = self.session
        most = max(room[b] for b in alive)
        available: dict[str, tuple[int, int]] = {}
        runs: dict[str, dict[int, int]] = {}
        for name, draft in session.drafts.items():
            available[name] = (most, 0)
            if isinstance(draft, NgramDraft):
                runs[name] = {b: draft.matched(b, self.texts[b])[1] for b in alive}
                longest = max(runs[name].values())
                available[name] = (most, longest) if longest else (0, 1)
        if session.fixed and available:
            name = next((n for n, (count, _) in available.items() if count), "none")
            count = min(session.fixed, available.get(name, (0, 0))[0])
            return Choice(name, count), runs.get(name, {})
        choice = chooser.choose(available)
        return choice, runs.get(choice.name, {})

    def _judge(
        self, result: StepResult, proposal: Proposal, counts: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """How many drafts of each sequence stand, and the token behind them."""
        sampling, logits = self.sampling, result.logits
        alive = [b for b, on in enumerate(self.active) if on]
        if not sampling.greedy or sampling.repetition_penalty != 1.0:
            logits = logits.cpu()  # tokens are drawn there, whatever the decoder's device
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

    def _trace(self, name: str, rows: int) -> Tensor | None:
        """Where this step shall leave its states, if the next plan is to be made from them."""
        session = self.session
        due = name in session.planned and self.since_plan + 1 >= session.interval
        return session.planner.trace(rows) if session.planner is not None and due else None

    def _plan_if_due(self) -> None:
        """Plan from the newest traced token, unless that was done."""
        session = self.session
        if session.planner is None or self.traced is None:
            return
        start = time.perf_counter()
        plans = session.planner.plans(self.cache, *self.traced)
        for name, skipped in session.planned.items():
            draft = session.drafts[name]
            assert isinstance(draft, ModelDraft)
            draft.units = plans[skipped - 1].units
            self.out.plans.append(plans[skipped - 1])
        self.traced, self.since_plan = None, 0
        self.out.stats.plans += 1
        self.out.stats.plan_seconds += time.perf_counter() - start
