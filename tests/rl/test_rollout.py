"""Rollouts: what is sampled, and that it depends on nothing but its own numbers."""

from __future__ import annotations

import pytest
import torch

from saltire.errors import SaltireError
from saltire.rl.rollout import (
    TransformersRollout,
    cut_after_stop,
    invert_distribution,
    uniform_numbers,
)
from tests.rl.small import EOS, PAD, rollout_of, small_policy, some_prompts


def test_uniform_numbers_of_a_sequence_depend_on_it_alone() -> None:
    whole = uniform_numbers(3, 7, range(10), 20)
    assert torch.equal(uniform_numbers(3, 7, [6, 2], 20), whole[[6, 2]])
    assert torch.equal(uniform_numbers(3, 7, [6], 9), whole[6:7, :9])
    for other in (uniform_numbers(4, 7, range(10), 20), uniform_numbers(3, 8, range(10), 20)):
        assert not (other == whole).any()
    assert len(whole.unique()) == whole.numel()


def test_inversion_samples_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0, -3.0])
    uniforms = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for temperature in (0.5, 1.0, 2.0):
        tokens = invert_distribution(logits.expand(100_000, 5), uniforms, temperature)
        shares = torch.bincount(tokens, minlength=5) / 100_000
        torch.testing.assert_close(shares, (logits / temperature).softmax(0), rtol=0, atol=2e-5)


def test_rare_tokens_of_a_large_vocabulary_are_reached() -> None:
    """A float32 running sum ends short of 1 and can never pick the last tokens."""
    logits = torch.zeros(1, 151_936)
    last = invert_distribution(logits, torch.tensor([1 - 1e-12], dtype=torch.float64), 1.0)
    assert last.item() == 151_935


def test_completions_do_not_depend_on_the_batch_they_are_in() -> None:
    policy, prompts = small_policy(), some_prompts(12)
    numbers = uniform_numbers(0, 0, range(12), 8)
    whole = rollout_of(policy, batch=12)(prompts, numbers, 1.0)
    assert rollout_of(policy, batch=5)(prompts, numbers, 1.0) == whole
    assert rollout_of(policy)([prompts[7]], numbers[7:8], 1.0) == [whole[7]]


def test_generate_agrees_with_sampling_token_by_token() -> None:
    policy, prompts = small_policy(), some_prompts(6)
    numbers = uniform_numbers(1, 0, range(6), 8)
    for prompt, row, completion in zip(
        prompts, numbers, rollout_of(policy)(prompts, numbers, 0.7), strict=True
    ):
        tokens = list(prompt)
        for number in row:
            with torch.no_grad():
                logits = policy.model.eval()(torch.tensor([tokens])).logits[:, -1]
            tokens.append(int(invert_distribution(logits, number.reshape(1), 0.7)))
            if tokens[-1] == EOS:
                break
        assert tokens[len(prompt) :] == completion


def test_a_completion_ends_with_its_stop_token() -> None:
    assert cut_after_stop([5, 6, 2, 7, 2], [2]) == [5, 6, 2]
    assert cut_after_stop([5, 6], [2]) == [5, 6]
    assert cut_after_stop([], [2]) == []


def test_model_is_left_in_its_mode() -> None:
    policy = small_policy().train()
    rollout_of(policy)(some_prompts(2), uniform_numbers(0, 0, range(2), 2), 1.0)
    assert policy.model.training


def test_diverged_weights_are_named() -> None:
    policy = small_policy()
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(SaltireError, match="sequence 0"):
        rollout_of(policy)(some_prompts(2), uniform_numbers(0, 0, range(2), 2), 1.0)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(SaltireError, match="end-of-sequence"):
        TransformersRollout(small_policy().model, [], PAD)
