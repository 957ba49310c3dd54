"""Learning from the tokens of highest entropy only."""

from __future__ import annotations

import pytest
import torch

from saltire.errors import SaltireError
from saltire.rl.config import OptimiserConfig
from saltire.rl.step import Experience, score
from saltire.rl.top_entropy import on_top_entropy
from tests.rl.small import small_policy, some_sequences
from tests.rl.test_step import weights_after


def test_a_share_of_one_leaves_every_token_its_advantage() -> None:
    policy = small_policy()
    sequences = some_sequences(policy, 6)
    advantage = torch.linspace(-1, 1, 6)
    logprob, entropy = score(policy, sequences, 1.0, 6)
    spread = on_top_entropy(advantage, entropy, sequences.action, 1.0)
    plain = weights_after(policy, Experience(sequences, advantage, logprob))
    assert torch.equal(weights_after(policy, Experience(sequences, spread, logprob)), plain)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_the_highest_share_is_kept_and_the_mean_is_over_it(share: float) -> None:
    policy = small_policy()
    sequences = some_sequences(policy, 8)
    _, entropy = score(policy, sequences, 1.0, 8)
    action = sequences.action
    kept = on_top_entropy(torch.ones(8), entropy, action, share)
    tokens = int(action.sum())
    chosen = kept != 0
    assert tokens * share <= chosen.sum() < tokens * share + 1
    assert not chosen[~action].any()
    assert entropy[chosen].min() > entropy[action & ~chosen].max()
    assert float(kept.sum()) == pytest.approx(tokens)


def test_tokens_that_are_left_out_have_no_gradient() -> None:
    policy = small_policy()
    sequences = some_sequences(policy, 4)
    logprob, entropy = score(policy, sequences, 1.0, 4)
    # All but one token of the batch are sure: only its row may move anything.
    entropy = torch.zeros_like(entropy)
    row, place = sequences.action.nonzero()[0].tolist()
    entropy[row, place] = 1.0
    advantage = torch.tensor([2.0, -1.0, 1.0, -1.0])
    share = 1 / int(sequences.action.sum())
    kept = on_top_entropy(advantage, entropy, sequences.action, share)
    assert kept.nonzero().tolist() == [[row, place]]
    others = kept.clone()
    others[row, place] = 0
    still = weights_after(policy, Experience(sequences, others, logprob))
    assert torch.equal(still, torch.cat([p.detach().flatten() for p in policy.parameters()]))
    moved = weights_after(policy, Experience(sequences, kept, logprob))
    assert not torch.equal(moved, still)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, float("nan")])
def test_other_shares_are_refused(share: float) -> None:
    with pytest.raises(SaltireError, match="top_entropy"):
        OptimiserConfig(top_entropy=share)
    with pytest.raises(SaltireError, match="top_entropy"):
        on_top_entropy(torch.ones(1), torch.ones(1, 2), torch.ones(1, 2).bool(), share)
