"""GRPO, DAPO and Dr. GRPO as pure functions over packed action tokens.

All tensors of one micro-batch are flat, one entry per action token. The three losses differ in two
things only: how a group's rewards become advantages, and how much each token weighs. The weights
are made from *global* counts (all ranks, all micro-batches of one update), so that gradient
accumulation is a plain sum and splitting a batch changes nothing.

    J = Σ_t w_t · [ min(r_t·A_t, clip(r_t, 1 − ε_low, 1 + ε_high)·A_t) + β·H_t − κ·KL_t ]

Sources: GRPO, arXiv 2402.03300; DAPO, arXiv 2503.14476; Dr. GRPO, arXiv 2503.20783. KL is the k3
estimator, e^d − d − 1 with d = ln π_ref − ln π.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.rl.actuators import Knobs

Algorithm = Literal["grpo", "dapo", "dr_grpo"]
ALGORITHMS: tuple[Algorithm, ...] = ("grpo", "dapo", "dr_grpo")


def group_advantages(rewards: Tensor, algorithm: Algorithm) -> Tensor:
    """Each reward against its group: A = R − mean, over the deviation unless Dr. GRPO.

    rewards: f32 [P, G], G samples of each of P prompts. Returns f32 [P, G]. A group whose rewards
    are all equal has advantages of exactly 0 and teaches nothing; see :func:`informative`.
    """
    check_algorithm(algorithm)
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise SaltireError(
            f"group advantages: rewards are {list(rewards.shape)}; expected [prompts, samples] "
            "with at least 2 samples per prompt, since each is judged against the others."
        )
    if not bool(rewards.isfinite().all()):
        prompt, sample = (~rewards.isfinite()).nonzero()[0].tolist()
        raise SaltireError(
            f"group advantages: the reward of prompt {prompt}, sample {sample} is "
            f"{rewards[prompt, sample].item()}; rewards must be finite."
        )
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # The mean of equal numbers can be off by a rounding, which the division would blow up to ±1.
    centred = torch.where(informative(rewards).unsqueeze(1), centred, 0.0)
    if algorithm == "dr_grpo":
        return centred
    return centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + 1e-6)


def informative(rewards: Tensor) -> Tensor:
    """bool [P]: does the group hold at least two different rewards?"""
    return rewards.amax(dim=1) > rewards.amin(dim=1)


@dataclass(frozen=True)
class BatchSize:
    """What one update holds in all: sequences and action tokens over ranks and micro-batches."""

    sequences: int
    tokens: int
    max_length: int


def token_weights(lengths: Tensor, algorithm: Algorithm, size: BatchSize) -> Tensor:
    """The weight of each token of each sequence; over a whole update GRPO's and DAPO's sum to 1.

    GRPO: 1 / (sequences · own length). DAPO: 1 / tokens. Dr. GRPO: 1 / (sequences · max_length),
    so that no sequence is favoured for its length. lengths: int64 [B], action tokens of each
    sequence. Returns f32 [B]; an empty completion weighs 0.
    """
    check_algorithm(algorithm)
    if algorithm == "dapo":
        weights = torch.full(lengths.shape, 1 / max(size.tokens, 1))
    elif algorithm == "grpo":
        weights = 1 / (size.sequences * lengths.clamp(min=1).float())
    else:
        weights = torch.full(lengths.shape, 1 / (size.sequences * size.max_length))
    return torch.where(lengths.cpu() > 0, weights.cpu(), 0.0).to(lengths.device)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """DAPO's soft punishment: 0 up to max_length − buffer, then falling in a line to −1.

    lengths: int64 [...]. Returns f32 of the same shape. ``buffer`` = 0 is no penalty.
    """
    if buffer == 0:
        return torch.zeros(lengths.shape)
    over = (lengths - (max_length - buffer)).clamp(min=0).float()
    return -(over / buffer).clamp(max=1.0)


def shape_advantages(advantage: Tensor, logprob: Tensor, entropy: Tensor, knobs: Knobs) -> Tensor:
    """The two actuators that act on advantages; all tensors f32 [N], and none carries a gradient.

    ``advantage_shape`` ζ: A·(1 − ζ·sign(A)·ln π), the factor held at 0 or above so that no
    advantage changes its sign (REPO-R does not hold it). Positive ζ favours unlikely tokens.
    ``sign_weight`` α: A·(1 − α·sign(A)) where ln π > −H. Raising a token's probability lowers
    entropy exactly when ln π > −H, so that is what "likely" means here; EntroPIC uses a fixed
    probability.
    """
    sign = advantage.sign()
    if knobs.advantage_shape:
        advantage = advantage * (1 - knobs.advantage_shape * sign * logprob).clamp(min=0)
    if knobs.sign_weight:
        likely = logprob > -entropy
        advantage = torch.where(likely, advantage * (1 - knobs.sign_weight * sign), advantage)
    return advantage


@dataclass(frozen=True)
class TokenBatch:
    """Action tokens of one micro-batch, packed: each tensor is f32 [N].

    ``reference_logprob`` is needed only where the KL coefficient is above 0.
    """

    logprob: Tensor
    entropy: Tensor
    old_logprob: Tensor
    advantage: Tensor
    weight: Tensor
    reference_logprob: Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss:
    """The loss to differentiate, and sums over tokens that the caller divides by global counts."""

    loss: Tensor
    clipped_high: Tensor
    clipped_low: Tensor
    kl: Tensor
    ratio_max: Tensor


def policy_loss(batch: TokenBatch, knobs: Knobs, kl_coefficient: float = 0.0) -> PolicyLoss:
    """−J of the module's formula, summed over these tokens with their weights.

    ``clipped_high`` counts tokens with A > 0 held by the upper clip, ``clipped_low`` those with
    A < 0 held by the lower.
    """
    ratio = (batch.logprob - batch.old_logprob).exp()
    advantage = shape_advantages(batch.advantage, batch.old_logprob, batch.entropy.detach(), knobs)
    clipped = ratio.clamp(1 - knobs.clip_low, 1 + knobs.clip_high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if knobs.entropy_bonus:
        objective = objective + knobs.entropy_bonus * batch.entropy
    kl = torch.zeros_like(ratio)
    if kl_coefficient:
        if batch.reference_logprob is None:
            raise SaltireError("policy loss: a KL term needs the reference model's log-probs.")
        difference = batch.reference_logprob - batch.logprob
        kl = difference.exp() - difference - 1
        objective = objective - kl_coefficient * kl
    with torch.no_grad():
        high = (advantage > 0) & (ratio > 1 + knobs.clip_high)
        low = (advantage < 0) & (ratio < 1 - knobs.clip_low)
        largest = ratio.max() if ratio.numel() else ratio.new_ones(())
    return PolicyLoss(
        loss=-(objective * batch.weight).sum(),
        clipped_high=high.sum(),
        clipped_low=low.sum(),
        kl=kl.detach().sum(),
        ratio_max=largest,
    )


def check_algorithm(algorithm: str) -> None:
    """SaltireError unless it is one of the three."""
    if algorithm not in ALGORITHMS:
        raise SaltireError(
            f"there is no loss {algorithm!r}; choose one of {', '.join(ALGORITHMS)}."
        )
