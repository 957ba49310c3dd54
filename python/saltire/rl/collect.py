"""Collecting one step's rollouts: prompts, groups of completions, rewards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire.rl.config import RolloutConfig
from saltire.rl.curriculum import Curriculum
from saltire.rl.distributed import all_sum, share
from saltire.rl.losses import informative, overlong_penalty
from saltire.rl.policy import Sequences, pack
from saltire.rl.prompts import Codec, judge
from saltire.rl.rollout import Rollout, uniform_numbers
from saltire.rl.schedules import Phase
from saltire.rl.tasks import Task


@dataclass(frozen=True)
class Batch:
    """One step's rollouts on this rank, group after group, each of one prompt.

    places: this rank's groups by their number in the whole batch. prompts: each group's row of the
    task. sequences: [groups · samples]. rewards: f32 [groups, samples], penalties for length
    included. passes: bool [groups, samples], where the answer is right. stopped: bool likewise,
    where the completion ended by itself.
    """

    places: list[int]
    prompts: list[int]
    sequences: Sequences
    rewards: Tensor
    passes: Tensor
    stopped: Tensor


@dataclass(frozen=True)
class Collector:
    """Draws prompts, samples completions, judges them."""

    task: Task
    codec: Codec
    rollout: Rollout
    curriculum: Curriculum
    config: RolloutConfig
    seed: int

    def collect(self, step: int, phase: Phase, temperature: float) -> Batch:
        """This rank's part of the step's rollouts, at ``temperature``.

        With ``resample``, groups whose rewards are all equal are replaced by groups of other
        prompts, a few times at most. What a group holds depends on its place in the whole batch,
        never on the rank that samples it.
        """
        places = list(share(self.config.prompts, "rollout.prompts"))
        attempts = self.config.resample + 1
        prompts = [0] * len(places)
        groups: list[list[list[int]]] = [[] for _ in places]
        rewards = torch.zeros(len(places), self.config.samples)
        for attempt in range(step * attempts, (step + 1) * attempts):
            drawn = self.curriculum.draw(attempt, self.config.prompts, phase)
            dull = (~informative(rewards)).nonzero().flatten().tolist()
            for i in dull:
                prompts[i] = drawn[places[i]]
            chosen = [(places[i], prompts[i]) for i in dull]
            new = self._sample(attempt, chosen, temperature)
            for i, (group, judged) in zip(dull, new, strict=True):
                groups[i], rewards[i] = group, torch.tensor(judged)
        completions = [completion for group in groups for completion in group]
        asked = self._ask(prompts)
        sequences = pack(asked, completions, self.codec.pad)
        lengths = sequences.lengths.view(rewards.shape)
        stopped = [bool(c) and c[-1] in self.codec.stop for c in completions]
        penalty = overlong_penalty(lengths, self.config.max_new_tokens, self.config.overlong_buffer)
        return Batch(
            places,
            prompts,
            sequences,
            rewards + penalty,
            rewards >= 1.0,
            torch.tensor(stopped).view(rewards.shape),
        )

    def observe(self, batch: Batch) -> None:
        """Tell the curriculum every rank's pass rates, in the order of the whole batch."""
        table = torch.zeros(2, self.config.prompts, dtype=torch.float64)
        table[0, batch.places] = torch.tensor(batch.prompts, dtype=torch.float64)
        table[1, batch.places] = batch.passes.double().mean(dim=1)
        numbers, rates = torch.tensor(all_sum(table.flatten().tolist())).view(2, -1).tolist()
        self.curriculum.observe([int(number) for number in numbers], rates)

    def _sample(
        self, attempt: int, chosen: list[tuple[int, int]], temperature: float
    ) -> list[tuple[list[list[int]], list[float]]]:
        """For each (place, prompt) a group of completions and their rewards."""
        n = self.config.samples
        numbers = uniform_numbers(
            self.seed,
            attempt,
            [place * n + i for place, _ in chosen for i in range(n)],
            self.config.max_new_tokens,
        )
        asked = self._ask([prompt for _, prompt in chosen])
        completions = self.rollout(asked, numbers, temperature)
        rows = [self.task.rows[prompt] for _, prompt in chosen for _ in range(n)]
        rewards = judge(self.task, self.codec, rows, completions)
        return [(completions[i : i + n], rewards[i : i + n]) for i in range(0, len(completions), n)]

    def _ask(self, prompts: list[int]) -> list[list[int]]:
        """Each prompt's tokens, once for every sample of it."""
        encoded = [self.codec.encode(self.task.prompt(self.task.rows[p])) for p in prompts]
        return [tokens for tokens in encoded for _ in range(self.config.samples)]
