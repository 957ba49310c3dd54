"""CLaSp's plan: which layers a draft keeps, by dynamic programming on the last verified states.

g(i, j) is the state after i layers of which j were skipped; at each layer the state that is nearer
to the whole model's by cosine stays. The programme to the largest number of skipped layers gives
every smaller one for free. All j of a layer are one packed step: rows at the same position that see
the verified prefix and themselves, and leave nothing in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire import ops
from saltire.errors import SaltireError
from saltire.nn.decoder import Decoder
from saltire.nn.kv_cache import KVCache
from saltire.ops.decoder_layer import ATTENTION, MLP


@dataclass(frozen=True)
class Plan:
    """units: uint8 [L], what a draft runs. skipped: how many layers (or half layers) it leaves
    out. cosine: of its last state with the whole model's."""

    units: Tensor
    skipped: int
    cosine: float


class SkipPlanner:
    """Plans for one decoder; ``halves`` lets attention and MLP be skipped separately."""

    def __init__(self, decoder: Decoder, most: int, halves: bool = False) -> None:
        self.decoder, self.halves = decoder, halves
        self.steps = decoder.layers * (2 if halves else 1)
        if not 0 < most < self.steps:
            raise SaltireError(
                f"{most} skipped of {self.steps} {'half layers' if halves else 'layers'}; expected "
                f"1 to {self.steps - 1}: a draft needs something to run."
            )
        self.most = most

    def trace(self, rows: int) -> Tensor:
        """Where a step leaves the states of its wanted rows: f32 [2L + 1, rows, D]."""
        shape = (2 * self.decoder.layers + 1, rows, self.decoder.sizes.hidden)
        return torch.empty(shape, device=self.decoder.device)

    def plans(self, cache: KVCache, sequence: int, position: int, states: Tensor) -> list[Plan]:
        """The best found plan for 1 to ``most`` skipped, from one verified token.

        position: the token's, whose prefix is verified in the cache. states: f32 [2L + 1, D], the
        whole model's states of that token between all half layers, before any final norm.
        """
        L, stride = self.steps, 1 if self.halves else 2
        truth = states[::stride]
        # held[j] is g(i, j); row 0 is the whole model's own state, never computed again.
        held = truth[0:1]
        kept = torch.zeros(L, self.most + 1, dtype=torch.uint8, device=states.device)
        one = torch.ones(1, device=states.device)
        cosines = one
        for i in range(L):
            run = min(held.shape[0] - 1, self.most)
            skipped = held[: self.most]  # g(i, j - 1) for j = 1, ...
            rows = skipped.shape[0]
            if run > 0:
                ran = held[1 : run + 1].clone()
                self._run(cache, sequence, position, i, ran)
                chosen, keep, cosine = ops.skip_plan_select(ran, skipped[:run], truth[i + 1])
                kept[i, 1 : run + 1] = keep
            else:
                chosen, cosine = skipped[:0], cosines[:0]
            if rows > run:  # everything so far skipped: there is only one such state
                last = skipped[rows - 1 :]
                only = torch.nn.functional.cosine_similarity(last, truth[i + 1][None])
                chosen, cosine = torch.cat([chosen, last]), torch.cat([cosine, only])
            held = torch.cat([truth[i + 1][None], chosen])
            cosines = torch.cat([one, cosine])
        kept[:, 0] = 1
        kept, all_cosines = kept.cpu(), cosines.tolist()
        return [self._plan(kept, j, all_cosines[j]) for j in range(1, self.most + 1)]

    def _run(self, cache: KVCache, sequence: int, position: int, step: int, states: Tensor) -> None:
        units = torch.zeros(self.decoder.layers, dtype=torch.uint8)
        if self.halves:
            units[step // 2] = MLP if step % 2 else ATTENTION
        else:
            units[step] = ATTENTION | MLP
        rows = self.decoder.private_rows(sequence, position, states.shape[0])
        self.decoder.step_rows(cache, rows, [], units, hidden=states)

    def _plan(self, kept: Tensor, skipped: int, cosine: float) -> Plan:
        units = torch.zeros(self.decoder.layers, dtype=torch.uint8)
        j = skipped
        for i in reversed(range(self.steps)):
            if kept[i, j]:
                if self.halves:
                    units[i // 2] |= MLP if i % 2 else ATTENTION
                else:
                    units[i] = ATTENTION | MLP
            else:
                j -= 1
        return Plan(units, skipped, cosine)
