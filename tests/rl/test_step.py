"""Scoring sequences and updating the policy."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from saltire.errors import SaltireError
from saltire.rl.actuators import Knobs
from saltire.rl.losses import ALGORITHMS
from saltire.rl.policy import Policy, Sequences, pack
from saltire.rl.step import Experience, UpdateConfig, micro_batches, score, update
from tests.rl.small import BOS, EOS, PAD, small_policy, some_sequences


def experience_for(policy: Policy, count: int = 12) -> Experience:
    sequences = some_sequences(policy, count)
    logprob, _ = score(policy, sequences, 1.0, count)
    return Experience(sequences, torch.linspace(-1, 1, count), logprob)


def weights_after(policy: Policy, experience: Experience, knobs=Knobs(), **config) -> torch.Tensor:  # noqa: B008
    policy = copy.deepcopy(policy)
    optimiser = torch.optim.SGD(policy.parameters(), lr=0.1)
    update(
        policy,
        optimiser,
        experience,
        knobs,
        UpdateConfig(max_grad_norm=1e9, max_length=6, **config),
    )
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_scores_equal_those_of_the_whole_logits() -> None:
    policy = small_policy()
    sequences = some_sequences(policy)
    logprob, entropy = score(policy, sequences, 0.8, micro_batch=5)
    for row in range(len(sequences.tokens)):
        length = int(sequences.attention[row].sum())
        tokens = sequences.tokens[row, :length]
        with torch.no_grad():
            log_p = (policy.model(tokens[None]).logits[0].double() / 0.8).log_softmax(-1)
        for place in sequences.action[row].nonzero().flatten().tolist():
            expected = log_p[place - 1]
            assert logprob[row, place] == pytest.approx(float(expected[tokens[place]]), abs=1e-4)
            assert entropy[row, place] == pytest.approx(
                float(-(expected.exp() * expected).sum()), abs=1e-4
            )
    assert not logprob[~sequences.action].any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_micro_batches_do_not_change_the_update(algorithm) -> None:
    policy = small_policy()
    experience = experience_for(policy)
    knobs = Knobs(entropy_bonus=0.01)
    whole = weights_after(policy, experience, knobs, algorithm=algorithm, micro_batch=12)
    split = weights_after(policy, experience, knobs, algorithm=algorithm, micro_batch=5)
    torch.testing.assert_close(split, whole, rtol=0, atol=2e-6)
    before = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert (whole - before).abs().max() > 1e-3


def test_update_makes_rewarded_sequences_likelier() -> None:
    policy = small_policy()
    experience = experience_for(policy)
    before = experience.old_logprob.sum(dim=1)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for _ in range(5):
        update(policy, optimiser, experience, Knobs(), UpdateConfig())
    gain = score(policy, experience.sequences, 1.0, 12)[0].sum(dim=1) - before
    assert torch.corrcoef(torch.stack([gain, experience.advantage]))[0, 1] > 0.5


def test_one_advantage_per_token_can_be_given() -> None:
    policy = small_policy()
    experience = experience_for(policy)
    spread = experience.advantage.unsqueeze(1).expand(experience.sequences.tokens.shape)
    per_token = Experience(experience.sequences, spread, experience.old_logprob)
    assert torch.equal(weights_after(policy, experience), weights_after(policy, per_token))


def test_a_negative_entropy_bonus_lowers_entropy_and_a_positive_one_raises_it() -> None:
    entropies = []
    for bonus in (-1.0, 0.0, 1.0):
        policy = small_policy()
        experience = experience_for(policy)
        optimiser = torch.optim.SGD(policy.parameters(), lr=0.1)
        update(policy, optimiser, experience, Knobs(entropy_bonus=bonus), UpdateConfig())
        _, entropy = score(policy, experience.sequences, 1.0, 12)
        entropies.append(float(entropy.sum()))
    assert entropies[0] < entropies[1] < entropies[2]


def test_empty_completions_are_carried_and_weigh_nothing() -> None:
    policy = small_policy()
    sequences = pack([[BOS, 5], [BOS, 6, 7]], [[], [8, EOS]], PAD)
    assert sequences.lengths.tolist() == [0, 2]
    logprob, _ = score(policy, sequences, 1.0, 1)
    one = Experience(sequences, torch.tensor([5.0, 1.0]), logprob)
    other = Experience(sequences, torch.tensor([-5.0, 1.0]), logprob)
    for micro_batch in (1, 2):
        first = weights_after(policy, one, micro_batch=micro_batch)
        assert torch.equal(first, weights_after(policy, other, micro_batch=micro_batch))


def test_all_empty_completions_leave_the_weights_alone() -> None:
    policy = small_policy()
    sequences = pack([[BOS, 5], [BOS, 6]], [[], []], PAD)
    experience = Experience(sequences, torch.ones(2), torch.zeros(sequences.tokens.shape))
    before = torch.cat([p.detach().flatten() for p in policy.parameters()])
    assert torch.equal(weights_after(policy, experience), before)


def test_nan_weights_are_reported_with_their_token_and_not_made_worse() -> None:
    policy = small_policy()
    experience = experience_for(policy)
    with torch.no_grad():
        policy.model.model.norm.weight[0] = math.nan
    with pytest.raises(SaltireError, match=r"sequence \d+, position \d+ \(token \d+\)"):
        weights_after(policy, experience)


def test_gradient_that_is_not_finite_leaves_weights_alone() -> None:
    policy = small_policy()
    experience = experience_for(policy)
    wild = Experience(experience.sequences, experience.advantage * math.inf, experience.old_logprob)
    before = [p.detach().clone() for p in policy.parameters()]
    optimiser = torch.optim.AdamW(policy.parameters())
    with pytest.raises(SaltireError, match="as they were"):
        update(policy, optimiser, wild, Knobs(), UpdateConfig())
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_every_row_is_in_exactly_one_micro_batch() -> None:
    sequences = some_sequences(small_policy(), 13)
    rows = torch.cat([rows for rows, real in micro_batches(sequences, 4) if real])
    assert sorted(rows.tolist()) == list(range(13))


def test_sequences_refuse_what_cannot_be_scored() -> None:
    tokens = torch.ones(2, 3, dtype=torch.int64)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(SaltireError, match="position 0"):
        Sequences(tokens, mask, mask)
    with pytest.raises(SaltireError, match="one shape"):
        Sequences(tokens, mask, mask[:, :2])
    with pytest.raises(SaltireError, match="prompt 1 is empty"):
        pack([[1], []], [[2], [2]], PAD)


def test_bf16_stays_close_to_float32() -> None:
    policy = small_policy()
    sequences = some_sequences(policy)
    whole, half = (score(policy, sequences, 1.0, 12, bf16=bf16)[1] for bf16 in (False, True))
    assert not torch.equal(whole, half)
    assert (whole - half).abs().max() < 0.05
