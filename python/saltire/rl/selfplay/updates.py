"""Scoring and updating on the turns of one step's matches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.rl.actuators import Knobs
from saltire.rl.control import EntropyMeter
from saltire.rl.distributed import all_sum
from saltire.rl.policy import Sequences, pack
from saltire.rl.selfplay.collect import Played
from saltire.rl.selfplay.config import SelfPlayConfig, learning_rate
from saltire.rl.selfplay.parts import SelfPlayParts
from saltire.rl.step import Experience, UpdateConfig, UpdateStats, score, update

NO_MATCH = -1


@dataclass(frozen=True)
class Turns:
    """What the learner wrote in one step, on this rank.

    sequences: each reply after its prompt. places: int64 [B], the match of each; where this rank
    has none, one sequence without a token to learn from stands in, its place NO_MATCH, so that the
    rank keeps step with the others.
    """

    sequences: Sequences
    places: Tensor

    @classmethod
    def of(cls, played: Played, pad: int, device: torch.device) -> Turns:
        """Raises SaltireError if the learner had no turn on any rank."""
        (turns,) = all_sum([len(played.turns)])
        if not turns:
            raise SaltireError(
                "the learner wrote nothing in a whole step: every match ended before its turn "
                "came. Give it another opponent, or a smaller opponent.share."
            )
        if not played.turns:
            sequences = pack([[pad]], [[pad]], pad, action=False)
            return cls(sequences.to(device), torch.tensor([NO_MATCH], device=device))
        places = torch.tensor([turn.match for turn in played.turns], device=device)
        return cls(played.sequences(pad).to(device), places)

    def advantages(self, by_turn: list[float]) -> Tensor:
        """f32 [B], one for each sequence."""
        return torch.tensor(by_turn or [0.0], device=self.places.device)


def measure(
    parts: SelfPlayParts, config: SelfPlayConfig, sequences: Sequences, temperature: float
) -> tuple[Tensor, float]:
    """The present policy's log-probs, f32 [B, S], and its mean entropy over all ranks."""
    how = config.update
    logprob, entropy = score(parts.policy, sequences, temperature, how.micro_batch, how.bf16)
    meter = EntropyMeter()
    meter.add(entropy, sequences.action)
    return logprob, meter.mean()


def learn(
    parts: SelfPlayParts,
    config: SelfPlayConfig,
    experience: Experience,
    places: Tensor,
    knobs: Knobs,
    step: int,
) -> list[UpdateStats]:
    """All updates on one step's matches; a mini-batch holds every ``minibatches``-th match.

    places: see :class:`Turns`.
    """
    of = config.update
    for group in parts.optimiser.param_groups:
        group["lr"] = learning_rate(of, step)
    how = UpdateConfig(
        of.algorithm,
        of.micro_batch,
        of.max_grad_norm,
        0.0,
        config.matches.max_new_tokens,
        of.bf16,
    )
    rows = [
        ((places >= 0) & (places % of.minibatches == part)).nonzero().flatten()
        for part in range(of.minibatches)
    ]
    counts = all_sum([len(some) for some in rows])
    first = torch.zeros(1, dtype=torch.int64, device=places.device)
    return [
        update(
            parts.policy,
            parts.optimiser,
            experience.rows(some if len(some) else first),
            knobs,
            how,
            counted=len(some) > 0,
        )
        for _ in range(of.epochs)
        for some, count in zip(rows, counts, strict=True)
        if count
    ]
