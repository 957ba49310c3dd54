"""What the end-to-end step makes small: how far the quantised model is from its teacher.

Source: BDQ, section 3. The paper prints RCE = -Σ( q log p - p log m ), m = δp + (1 - δ)q, which is
CE(q, p) - CE(p, m): minimising it also drives p away from m. Its prose (fit both, robust to noisy
labels) is the symmetric form CE(q, p) + CE(p, m). Both are here; the symmetric one is ``rce``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Loss = Literal["kl", "ce", "rce", "rce-printed", "mse"]
LOSSES: tuple[Loss, ...] = ("kl", "ce", "rce", "rce-printed", "mse")
DELTA = 0.5  # the paper's δ


def token_loss(student: Tensor, teacher: Tensor, loss: Loss, delta: float = DELTA) -> Tensor:
    """The mean over tokens, in nats (``mse``: squared logits, each token's mean taken off).

    student, teacher: float [tokens, V] logits; p and q their softmax. kl: Σ q log(q/p). ce:
    -Σ q log p. rce: ce - Σ p log m. rce-printed: ce + Σ p log m.
    """
    if loss == "mse":
        difference = student - teacher
        difference = difference - difference.mean(-1, keepdim=True)
        return difference.square().mean()
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    q = log_q.exp()
    cross = -(q * log_p).sum(-1).mean()
    if loss == "kl":
        return cross + (q * log_q).sum(-1).mean()
    if loss == "ce":
        return cross
    p = log_p.exp()
    # m is bounded below by (1 - δ)q, which underflows only where p does not matter.
    reverse = -(p * (delta * p + (1 - delta) * q).clamp_min(1e-30).log()).sum(-1).mean()
    return cross + reverse if loss == "rce" else cross - reverse
