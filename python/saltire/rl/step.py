"""One policy-gradient update: from sequences, old log-probs and advantages to new weights.

This is all that an algorithm needs of the trainer; self-play calls it with advantages of its own.
Nothing here re-centres, whitens or filters advantages.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.rl.actuators import Knobs
from saltire.rl.distributed import all_max, all_sum, sync_gradients, world_size
from saltire.rl.losses import Algorithm, BatchSize, TokenBatch, policy_loss, token_weights
from saltire.rl.policy import Policy, Sequences


@dataclass(frozen=True)
class Experience:
    """This rank's sequences with what the update needs of each token.

    advantage: f32 [B], or [B, S] for one per token. old_logprob and reference_logprob: f32 [B, S],
    read where ``sequences.action`` is true.
    """

    sequences: Sequences
    advantage: Tensor
    old_logprob: Tensor
    reference_logprob: Tensor | None = None

    def rows(self, rows: Tensor) -> Experience:
        """Some of the sequences."""
        sequences = self.sequences.rows(rows)
        width = sequences.tokens.shape[1]
        reference = self.reference_logprob
        return Experience(
            sequences,
            self.advantage[rows] if self.advantage.dim() == 1 else self.advantage[rows, :width],
            self.old_logprob[rows, :width],
            None if reference is None else reference[rows, :width],
        )


@dataclass(frozen=True)
class UpdateConfig:
    """How an update is computed: the loss, its size in memory, and its guard rails."""

    algorithm: Algorithm = "dapo"
    micro_batch: int = 8
    max_grad_norm: float = 1.0
    kl_coefficient: float = 0.0
    max_length: int = 256
    bf16: bool = False


@dataclass(frozen=True)
class UpdateStats:
    """Global means over the tokens of one update; ``grad_norm`` is before clipping."""

    loss: float
    entropy: float
    clipped_high: float
    clipped_low: float
    kl: float
    ratio_max: float
    grad_norm: float


def update(
    policy: Policy,
    optimiser: torch.optim.Optimizer,
    experience: Experience,
    knobs: Knobs,
    config: UpdateConfig,
    counted: bool = True,
) -> UpdateStats:
    """One optimiser step on the whole of ``experience``, over all ranks, in micro-batches.

    The result does not depend, but for rounding, on ``micro_batch`` or on how the sequences are
    spread over ranks. counted: False for a rank that has nothing to learn from in this step, and
    gives some sequence so that it computes as often as the others. Raises SaltireError, with the
    weights as they were, if the gradient is not finite.
    """
    sequences = experience.sequences
    counts = all_sum([len(sequences.tokens) * counted, int(sequences.lengths.sum()) * counted])
    size = BatchSize(int(counts[0]), int(counts[1]), config.max_length)
    weights = token_weights(sequences.lengths, config.algorithm, size)
    optimiser.zero_grad(set_to_none=True)
    sums = torch.zeros(5, dtype=torch.float64)
    ratio_max = 1.0
    parts = micro_batches(sequences, config.micro_batch)
    for index, (rows, own) in enumerate(parts):
        real = own and counted
        part = experience.rows(rows)
        lengths = part.sequences.lengths
        action = part.sequences.action
        with precision(action.device, config.bf16):
            logprob, entropy = policy(part.sequences, knobs.temperature)
        reference = part.reference_logprob
        result = policy_loss(
            TokenBatch(
                logprob,
                entropy,
                part.old_logprob[action],
                (
                    part.advantage.repeat_interleave(lengths)
                    if part.advantage.dim() == 1
                    else part.advantage[action]
                ),
                (weights[rows] * real).repeat_interleave(lengths),
                None if reference is None else reference[action],
            ),
            knobs,
            config.kl_coefficient,
        )
        sync_gradients(policy, index == len(parts) - 1)
        # FSDP averages gradients over ranks; the weights already make them a sum.
        (result.loss * world_size()).backward()
        if real:
            sums += torch.stack(
                [
                    result.loss.detach(),
                    entropy.detach().sum(),
                    result.clipped_high,
                    result.clipped_low,
                    result.kl,
                ]
            ).to("cpu", torch.float64)
            ratio_max = max(ratio_max, float(result.ratio_max))
    norm = clip_gradients(policy, config.max_grad_norm)
    optimiser.step()
    loss, entropy_sum, high, low, kl = all_sum(sums.tolist())
    tokens = max(size.tokens, 1)
    return UpdateStats(
        loss=loss,
        entropy=entropy_sum / tokens,
        clipped_high=high / tokens,
        clipped_low=low / tokens,
        kl=kl / tokens,
        ratio_max=all_max([ratio_max])[0],
        grad_norm=norm,
    )


@torch.no_grad()
def score(
    policy: Policy, sequences: Sequences, temperature: float, micro_batch: int, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy (nats) of every action token: two f32 [B, S], 0 where not an action."""
    logprobs = torch.zeros(sequences.tokens.shape, device=sequences.tokens.device)
    entropies = torch.zeros_like(logprobs)
    for rows, real in micro_batches(sequences, micro_batch):
        part = sequences.rows(rows)
        with precision(part.tokens.device, bf16):
            logprob, entropy = policy(part, temperature)
        if real:
            for whole, packed in ((logprobs, logprob), (entropies, entropy)):
                padded = torch.zeros(part.tokens.shape, device=packed.device)
                padded[part.action] = packed
                whole[rows, : padded.shape[1]] = padded
    return logprobs, entropies


def micro_batches(sequences: Sequences, size: int) -> list[tuple[Tensor, bool]]:
    """Row numbers of each micro-batch, longest sequences first so that little padding is computed.

    Every rank gets the same number, or a sharded model would wait for ever; a rank that has run
    out repeats its first micro-batch, marked False: it is computed and not counted.
    """
    if size < 1:
        raise SaltireError(f"micro_batch is {size}; it must be at least 1.")
    order = sequences.attention.sum(dim=1).argsort(descending=True, stable=True)
    own = [(rows, True) for rows in order.split(size) if len(rows)]
    wanted = int(all_max([len(own)])[0])
    if not own and wanted:
        raise SaltireError("a rank has no sequences at all; give every rank at least one.")
    return own + [(own[0][0], False)] * (wanted - len(own))


def clip_gradients(policy: nn.Module, limit: float) -> float:
    """Scale gradients to a global norm of at most ``limit``; return the norm before.

    Raises SaltireError, before any weight has changed, if it is not finite.
    """
    trained = [p for p in policy.parameters() if p.grad is not None]
    norm = nn.utils.clip_grad_norm_(trained, limit)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    value = float(norm)
    if not math.isfinite(value):
        raise SaltireError(
            f"the gradient's norm is {value}; the weights have been left as they were. Lower the "
            "learning rate, or look for rewards or log-probs of extreme size, and resume."
        )
    return value


@contextlib.contextmanager
def precision(device: torch.device, bf16: bool) -> Iterator[None]:
    """Compute in bf16 where that is safe, over float32 weights; or in float32 throughout.

    The weights stay float32: with a learning rate of 1e-6, bf16 weights would round most updates
    to nothing.
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        yield
