"""Learning from the tokens where the policy was undecided, and from no other.

Source: Wang et al., Beyond the 80/20 Rule (2025), who keep 20% of the tokens. Tied to entropy
scheduling only by the entropies, which the trainer has anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import top_entropy_mask
from saltire.rl.distributed import gather


def on_top_entropy(advantage: Tensor, entropy: Tensor, action: Tensor, share: float) -> Tensor:
    """Advantages of the ``share`` of tokens with the highest entropy over all ranks; 0 elsewhere.

    advantage: f32 [B]. entropy: [B, S], nats, read where action, bool [B, S], is true. Returns f32
    [B, S]. What is kept is scaled by all tokens over those kept, so that DAPO's mean over tokens
    becomes the mean over those kept. Raises SaltireError unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise SaltireError(f"top_entropy is {share}; it must be above 0 and at most 1.")
    spread = advantage[:, None] * action
    if share == 1:
        return spread
    everyones = torch.tensor(gather(entropy[action].tolist()), dtype=entropy.dtype)
    if not len(everyones):
        return spread
    kept = everyones[top_entropy_mask(everyones, share)]
    chosen = action & (entropy >= kept.min().to(entropy.device))
    return spread * chosen * (len(everyones) / len(kept))
