"""The policy: a causal language model, and the statistics of its action tokens.

Only action tokens are ever scored: the hidden states at their positions are gathered first, so
neither prompts nor padding cost a row of logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saltire.errors import SaltireError
from saltire.ops import linear_token_stats
from saltire.ops.library import HAS_CUDA_KERNELS


@dataclass(frozen=True)
class Sequences:
    """Prompts with their completions, right-padded.

    tokens: int64 [B, S]. attention: bool [B, S], false on padding. action: bool [B, S], true where
    the token was chosen by the policy; ``action[:, 0]`` is false, for nothing predicts a first
    token. "Packed" tensors elsewhere hold one entry per true ``action``, row by row.
    """

    tokens: Tensor
    attention: Tensor
    action: Tensor

    def __post_init__(self) -> None:
        shape = self.tokens.shape
        if len(shape) != 2 or self.attention.shape != shape or self.action.shape != shape:
            raise SaltireError(
                f"sequences: tokens are {list(shape)}, attention {list(self.attention.shape)} and "
                f"action {list(self.action.shape)}; all three must have one shape, [B, S]."
            )
        if shape[1] and bool(self.action[:, 0].any()):
            raise SaltireError(
                "sequences: action is true at position 0, which no position predicts. "
                "Put a prompt of at least one token (a BOS, say) before the first action."
            )

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: action tokens of each sequence."""
        return self.action.sum(dim=1)

    def rows(self, rows: Tensor) -> Sequences:
        """Some of the sequences, without the columns that only longer ones need."""
        attention = self.attention[rows]
        width = int(attention.sum(dim=1).max()) if attention.numel() else 0
        return Sequences(self.tokens[rows, :width], attention[:, :width], self.action[rows, :width])

    def to(self, device: torch.device | str) -> Sequences:
        """The same on another device."""
        return Sequences(self.tokens.to(device), self.attention.to(device), self.action.to(device))


def pack(
    prompts: list[list[int]], completions: list[list[int]], pad: int, action: bool = True
) -> Sequences:
    """Lay prompts and completions out as :class:`Sequences`; the completions are the actions.

    An empty completion is allowed and has no action tokens; an empty prompt is refused.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise SaltireError(
                f"pack: prompt {index} is empty; a completion needs at least one token before it."
            )
    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    tokens = torch.full((len(prompts), width), pad)
    attention = torch.zeros(tokens.shape, dtype=torch.bool)
    actions = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        end = len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor(prompt + completion)
        attention[row, :end] = True
        actions[row, len(prompt) : end] = action
    return Sequences(tokens, attention, actions)


class Policy(nn.Module):
    """A causal language model whose forward gives log-probs and entropies of action tokens.

    It is a module of its own so that FSDP can shard it whole: the head's weight is then gathered
    when ``forward`` runs, and we read it there without computing all logits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        for name in ("logits_scaling", "logit_scale"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise SaltireError(
                    f"the model scales its logits ({name} = {getattr(config, name)}), which the "
                    "trainer does not know. Use a model that does not."
                )
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    @property
    def vocabulary(self) -> int:
        """V, the rows of the head."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def max_entropy(self) -> float:
        """ln V, in nats."""
        return math.log(self.vocabulary)

    def forward(self, sequences: Sequences, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """Log-prob and entropy (nats) of each action token: two packed f32 [N].

        Both are of the distribution softmax(logits / temperature). Raises SaltireError if a log-
        prob is not finite, naming its token.
        """
        decoder = self.model.get_decoder()
        head = self.model.get_output_embeddings()
        hidden = decoder(
            input_ids=sequences.tokens,
            attention_mask=sequences.attention.long(),
            use_cache=False,
        ).last_hidden_state
        chosen = sequences.action[:, 1:]
        logprob, entropy = head_stats(
            hidden[:, :-1][chosen],
            head,
            sequences.tokens[:, 1:][chosen],
            temperature=temperature,
            softcap=self.softcap,
        )
        _refuse_non_finite(logprob, sequences)
        return logprob, entropy


def head_stats(
    hidden: Tensor,
    head: nn.Linear,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy of each distribution, from hidden states and the head.

    hidden: [N, D]. labels: int64 [N]. Returns f32 [N], f32 [N], both differentiable. The logits
    [N, V] are never held on the CPU, nor on a CUDA device in bfloat16.
    """
    if _is_fused(hidden, head):
        stats = linear_token_stats(
            hidden,
            head.weight,
            labels,
            bias=None if head.bias is None else head.bias.float(),
            temperature=temperature,
            softcap=softcap,
            check=False,
        )
        assert stats.logprob is not None
        return stats.logprob, stats.entropy
    logits = head(hidden).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(dim=-1)
    logprob = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1)
    return logprob, entropy


def _is_fused(hidden: Tensor, head: nn.Linear) -> bool:
    """Whether the op does it: on a device only where it uses the tensor cores."""
    if type(head) is not nn.Linear:
        return False
    bf16 = hidden.dtype == head.weight.dtype == torch.bfloat16 and hidden.shape[-1] % 8 == 0
    return not hidden.is_cuda or (HAS_CUDA_KERNELS and bf16)


def _refuse_non_finite(logprob: Tensor, sequences: Sequences) -> None:
    finite = logprob.detach().isfinite()
    if bool(finite.all()):
        return
    row, position = sequences.action.nonzero()[~finite][0].tolist()
    raise SaltireError(
        f"the policy's log-prob of sequence {row}, position {position} (token "
        f"{sequences.tokens[row, position].item()}) is {logprob[~finite][0].item()}; its logits "
        "have overflowed or the token is impossible. Lower the learning rate and resume from the "
        "last checkpoint."
    )
