"""From a task's rows to token ids, and from completions back to text and rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from saltire.errors import SaltireError
from saltire.rl.distributed import all_sum
from saltire.rl.passk import pass_at_k
from saltire.rl.rollout import Rollout, uniform_numbers
from saltire.rl.tasks import Row, Task

# The step number under which evaluation draws its uniform numbers: no training step comes near
# it, so evaluation never sees a training step's numbers, and two runs are evaluated with the same.
EVALUATION_STEP = 1 << 40


@dataclass(frozen=True)
class Codec:
    """A tokenizer, and how it asks: by its chat template if it has one, else BOS and the text."""

    tokenizer: Any
    instruction: str = ""

    @property
    def stop(self) -> list[int]:
        """The tokens that end a completion."""
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    @property
    def pad(self) -> int:
        """The token that fills; any will do, for it is masked."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else (self.stop or [0])[0]

    def encode(self, text: str) -> list[int]:
        """The prompt's token ids."""
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": text}]
            if self.instruction:
                messages.insert(0, {"role": "system", "content": self.instruction})
            rendered = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
            return list(self.tokenizer.encode(rendered, add_special_tokens=False))
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        asked = f"{self.instruction}\n{text}" if self.instruction else text
        return start + list(self.tokenizer.encode(asked, add_special_tokens=False))

    def decode(self, completion: Sequence[int]) -> str:
        """The completion's text, without special tokens."""
        return str(self.tokenizer.decode(list(completion), skip_special_tokens=True))


def judge(
    task: Task, codec: Codec, rows: Sequence[Row], completions: list[list[int]]
) -> list[float]:
    """The reward of each completion. Raises SaltireError if it is not a finite number."""
    rewards = []
    for row, completion in zip(rows, completions, strict=True):
        reward = float(task.reward(codec.decode(completion), row))
        if not math.isfinite(reward):
            raise SaltireError(
                f"task {task.name}: the reward of {codec.decode(completion)[:80]!r} is {reward}; a "
                "reward must be a finite number."
            )
        rewards.append(reward)
    return rewards


def pass_counts(
    task: Task,
    codec: Codec,
    rollout: Rollout,
    rows: Sequence[int],
    samples: int,
    max_new_tokens: int,
    seed: int,
) -> list[tuple[int, int]]:
    """(samples, right ones) for each of the task's ``rows``, at temperature 1."""
    repeated = [row for row in rows for _ in range(samples)]
    numbers = uniform_numbers(
        seed,
        EVALUATION_STEP,
        [row * samples + i for row in rows for i in range(samples)],
        max_new_tokens,
    )
    encoded = [codec.encode(task.prompt(task.rows[row])) for row in rows]
    prompts = [tokens for tokens in encoded for _ in range(samples)]
    completions = rollout(prompts, numbers, 1.0)
    rewards = judge(task, codec, [task.rows[row] for row in repeated], completions)
    return [
        (samples, sum(reward >= 1.0 for reward in rewards[i : i + samples]))
        for i in range(0, len(rewards), samples)
    ]


def pass_record(counts: Sequence[tuple[int, int]], ks: Sequence[int]) -> dict[str, float]:
    """Pass@k as ``pass@k`` entries of a log record: the mean over the prompts of all ranks."""
    sums = [sum(pass_at_k(n, c, k) for n, c in counts) for k in ks]
    *totals, prompts = all_sum([*sums, len(counts)])
    return {f"pass@{k}": total / prompts for k, total in zip(ks, totals, strict=True)}
