"""A character-level policy of a few thousand weights, with prompts for it."""

from __future__ import annotations

import torch

from saltire.rl.policy import Policy, Sequences, pack
from saltire.rl.rollout import TransformersRollout, uniform_numbers
from saltire.rl.scratch import character_tokenizer, small_model

PAD, BOS, EOS = 0, 1, 2


def small_policy(seed: int = 0) -> Policy:
    return Policy(small_model(len(character_tokenizer()), hidden=32, layers=2, seed=seed))


def rollout_of(policy: Policy, batch: int = 64) -> TransformersRollout:
    return TransformersRollout(policy.model, [EOS], PAD, batch)


def some_prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (count,), generator=generator).tolist()
    return [[BOS, *torch.randint(4, 20, (n,), generator=generator).tolist()] for n in lengths]


def some_sequences(policy: Policy, count: int = 12, seed: int = 0) -> Sequences:
    prompts = some_prompts(count, seed)
    numbers = uniform_numbers(seed, 0, range(count), 6)
    return pack(prompts, rollout_of(policy)(prompts, numbers, 1.0), PAD)
