"""GRPO, DAPO and Dr. GRPO."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saltire.errors import SaltireError
from saltire.rl.actuators import Knobs
from saltire.rl.losses import (
    ALGORITHMS,
    BatchSize,
    TokenBatch,
    group_advantages,
    informative,
    overlong_penalty,
    policy_loss,
    shape_advantages,
    token_weights,
)

rewards = st.integers(2, 6).flatmap(
    lambda g: st.lists(
        st.lists(st.floats(-2, 2, width=32), min_size=g, max_size=g), min_size=1, max_size=5
    )
)


@given(rewards, st.sampled_from(ALGORITHMS))
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order_of_rewards(values, algorithm) -> None:
    table = torch.tensor(values)
    advantages = group_advantages(table, algorithm)
    assert advantages.sum(dim=1).abs().max() < 1e-3
    order = table.argsort(dim=1)
    assert (advantages.gather(1, order).diff(dim=1) >= -1e-5).all()


@given(st.floats(-3, 3, width=32), st.integers(2, 9), st.sampled_from(ALGORITHMS))
def test_equal_rewards_give_exactly_no_advantage(reward, group, algorithm) -> None:
    """0.1 + 0.1 + 0.1 is not 0.3: the mean is off by a rounding, which must not become ±1."""
    table = torch.full((2, group), reward)
    assert not group_advantages(table, algorithm).any()
    assert not informative(table).any()


def test_only_dr_grpo_keeps_the_scale_of_rewards() -> None:
    table = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    for algorithm in ALGORITHMS:
        small, large = group_advantages(table, algorithm), group_advantages(10 * table, algorithm)
        scale = 10 if algorithm == "dr_grpo" else 1
        torch.testing.assert_close(large, scale * small, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "bad", [torch.zeros(3), torch.zeros(3, 1), torch.tensor([[0.0, torch.nan]])]
)
def test_impossible_rewards_are_refused(bad) -> None:
    with pytest.raises(SaltireError):
        group_advantages(bad, "grpo")


def test_weights_follow_each_paper() -> None:
    lengths = torch.tensor([1, 4, 0])
    size = BatchSize(sequences=3, tokens=5, max_length=10)
    expected = {
        "grpo": [1 / 3, 1 / 12, 0],
        "dapo": [1 / 5, 1 / 5, 0],
        "dr_grpo": [1 / 30, 1 / 30, 0],
    }
    for algorithm, weights in expected.items():
        torch.testing.assert_close(
            token_weights(lengths, algorithm, size), torch.tensor(weights), rtol=1e-6, atol=0
        )


def random_batch(n: int = 200, seed: int = 0) -> TokenBatch:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(n, generator=generator)  # noqa: E731
    old = -draw().abs()
    return TokenBatch(
        logprob=(old + 0.3 * draw()).clamp(max=0).requires_grad_(),
        entropy=draw().abs().requires_grad_(),
        old_logprob=old,
        advantage=draw(),
        weight=torch.full((n,), 1 / n),
        reference_logprob=old + 0.1 * draw(),
    )


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    batch = random_batch()
    logprob = batch.old_logprob.clone().requires_grad_()
    batch = TokenBatch(logprob, batch.entropy, batch.old_logprob, batch.advantage, batch.weight)
    policy_loss(batch, Knobs()).loss.backward()
    torch.testing.assert_close(logprob.grad, -batch.advantage * batch.weight)


def test_clip_stops_the_gradient_of_exactly_the_tokens_it_counts() -> None:
    batch, knobs = random_batch(), Knobs(clip_low=0.1, clip_high=0.3)
    result = policy_loss(batch, knobs)
    result.loss.backward()
    ratio = (batch.logprob - batch.old_logprob).exp().detach()
    high = (ratio > 1.3) & (batch.advantage > 0)
    low = (ratio < 0.9) & (batch.advantage < 0)
    assert (result.clipped_high, result.clipped_low) == (high.sum(), low.sum())
    assert high.sum() > 5
    assert low.sum() > 5
    assert torch.equal(batch.logprob.grad == 0, high | low)


def test_on_policy_the_upper_clip_changes_nothing() -> None:
    """The trap: with one update per rollout the ratio is 1, and clip_high is disconnected."""
    source = random_batch()
    gradients = []
    for clip_high in (0.0, 0.28, 2.5):
        logprob = source.old_logprob.clone().requires_grad_()
        batch = TokenBatch(
            logprob, source.entropy, source.old_logprob, source.advantage, source.weight
        )
        policy_loss(batch, Knobs(clip_high=clip_high)).loss.backward()
        gradients.append(logprob.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("bonus", [0.05, -0.05])
def test_entropy_bonus_pushes_entropy_by_its_sign(bonus) -> None:
    batch = random_batch()
    policy_loss(batch, Knobs(entropy_bonus=bonus)).loss.backward()
    torch.testing.assert_close(-batch.entropy.grad, bonus * batch.weight)


def test_without_a_bonus_entropy_gets_no_gradient() -> None:
    batch = random_batch()
    policy_loss(batch, Knobs()).loss.backward()
    assert batch.entropy.grad is None


def test_kl_is_positive_and_pulls_towards_the_reference() -> None:
    batch = random_batch()
    result = policy_loss(batch, Knobs(), kl_coefficient=1.0)
    assert result.kl > 0
    still = TokenBatch(
        batch.logprob, batch.entropy, batch.old_logprob, 0 * batch.advantage, batch.weight,
        batch.reference_logprob,
    )  # fmt: skip
    policy_loss(still, Knobs(), kl_coefficient=1.0).loss.backward()
    towards = (batch.reference_logprob - batch.logprob.detach()).sign()
    assert torch.equal(-batch.logprob.grad.sign(), towards)


@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(0, 99))
def test_shaping_never_turns_an_advantage_round(shape, weight, seed) -> None:
    batch = random_batch(seed=seed)
    knobs = Knobs(advantage_shape=shape, sign_weight=weight)
    shaped = shape_advantages(batch.advantage, batch.old_logprob, batch.entropy.detach(), knobs)
    assert (shaped * batch.advantage >= 0).all()


def entropy_change(knobs: Knobs, advantage: torch.Tensor) -> float:
    """dH along the expected policy gradient of a softmax over 6 tokens."""
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0], dtype=torch.float64)
    logits.requires_grad_()
    log_p = logits.log_softmax(0)
    entropy = -(log_p.exp() * log_p).sum()
    (entropy_gradient,) = torch.autograd.grad(entropy, logits, retain_graph=True)
    shaped = shape_advantages(advantage.double(), log_p.detach(), entropy.detach().expand(6), knobs)
    objective = (log_p.exp().detach() * shaped * log_p).sum()
    (policy_gradient,) = torch.autograd.grad(objective, logits)
    return float(entropy_gradient @ policy_gradient)


@pytest.mark.parametrize("name", ["advantage_shape", "sign_weight"])
@pytest.mark.parametrize(
    "advantage", [[1, -1, -1, -1, -1, -1], [-1, -1, 1, 1, 1, 1], [1, -1, 1, -1, 1, -1]]
)
def test_a_larger_setting_of_a_shaping_actuator_raises_entropy(name, advantage) -> None:
    changes = [
        entropy_change(Knobs(**{name: setting}), torch.tensor(advantage, dtype=torch.float64))
        for setting in (-0.5, 0.0, 0.5)
    ]
    assert changes[0] < changes[1] < changes[2]


def test_overlong_penalty_falls_in_a_line_to_minus_one() -> None:
    lengths = torch.tensor([5, 80, 85, 90, 100])
    assert overlong_penalty(lengths, 90, 10).tolist() == pytest.approx([0, 0, -0.5, -1, -1])
    assert not overlong_penalty(lengths, 90, 0).any()
