"""Log-probabilities of many targets behind one prefix, the prefix computed once.

The layers run on prefix and targets together, so nothing is kept from one layer to the next: no
cache of keys and values. Inside a layer a target's queries attend to the prefix's keys, all targets
in one call without a mask, and causally to their own; the two results are merged by their log-sums
of exponentials, which is exact::

    out = (e^a · out_a + e^b · out_b) / (e^a + e^b)

Source of the split: Hydragen (2402.05099), section 3; applied here to scoring, not decoding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for
from saltire.ops.token_stats import TokenStats, linear_token_stats, token_stats

# Rows of logits alive at once behind a quantised head: 128 · V · 4 bytes, 25 MB for V = 49,152. An
# ordinary head's logits are never held, and its products are in f32 whatever the model's kind: with
# bf16 logits the last bit is 0.06 nats at 16, and a window sums a hundred of them.
HEAD_ROWS = 128


class SharedPrefixScorer:
    """Scores with a transformers Llama, Mistral, Qwen2 or Qwen3, quantised or not."""

    def __init__(self, model: Any) -> None:
        adapter = adapter_for(model.config)
        self.model = model
        self.blocks: list[Any] = list(adapter.blocks(model))
        self.norm = model.get_submodule(adapter.norm_path)
        self.head = model.get_submodule(adapter.head_path)
        self.rotary: Any = model.model.rotary_emb
        self.window = self._narrowest_window()

    @torch.inference_mode()
    def score(self, prefix: Tensor, targets: Sequence[Tensor]) -> list[Tensor]:
        """Log-probabilities, in nats, of each target's tokens from its second on.

        prefix: int64 [P], may be empty. targets: int64 [t], each at least one token; a target's
        positions go on behind the prefix, and targets do not see one another. The first token is
        context only, so that with and without a prefix the same tokens are scored. Returns f32
        [t - 1] for each target. Raises SaltireError if the model's positions do not suffice.
        """
        P, m, longest = len(prefix), len(targets), max(len(t) for t in targets)
        self._check_length(P + longest)
        device = self.model.device
        padded = torch.zeros(m, longest, dtype=torch.int64)
        for row, target in enumerate(targets):
            padded[row, : len(target)] = target  # padding stands behind: causally unseen
        ids = torch.cat([prefix, padded.flatten()]).to(device)
        place = torch.arange(P + longest, device=device)
        places = torch.cat([place[:P], place[P:].repeat(m)])
        x = self.model.get_input_embeddings()(ids)
        cos, sin = self.rotary(x[None], places[None])
        for block in self.blocks:
            x = x + self._attention(block, x, cos[0, :, None], sin[0, :, None], P, m)
            x = x + block.mlp(block.post_attention_layernorm(x))
        rows = (P + torch.arange(m)[:, None] * longest + torch.arange(longest - 1)).flatten()
        wanted = padded[:, 1:].flatten()
        inside = torch.arange(longest - 1) < torch.tensor([len(t) - 1 for t in targets])[:, None]
        rows, wanted = rows[inside.flatten()].to(device), wanted[inside.flatten()].to(device)
        scores = self._log_probabilities(self.norm(x[rows]), wanted).cpu()
        return list(scores.split([len(t) - 1 for t in targets]))

    def _attention(self, block: Any, x: Tensor, cos: Tensor, sin: Tensor, P: int, m: int) -> Tensor:
        attention = block.self_attn
        h = block.input_layernorm(x)
        d = attention.head_dim
        q, k, v = (
            project(h).view(len(x), -1, d)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)

        def of_prefix(t: Tensor) -> Tensor:  # [1, heads, P, d]
            return t[:P].transpose(0, 1)[None]

        def of_targets(t: Tensor) -> Tensor:  # [m, heads, t, d]
            return t[P:].view(m, -1, *t.shape[1:]).transpose(1, 2)

        own, own_sum = _flash(of_targets(q), of_targets(k), of_targets(v), causal=True)
        if P == 0:
            out = own.transpose(1, 2).reshape(len(x), -1)
            return attention.o_proj(out)
        first, _ = _flash(of_prefix(q), of_prefix(k), of_prefix(v), causal=True)
        behind = q[P:].transpose(0, 1)[None]  # every target's queries in one row
        shared, shared_sum = _flash(behind, of_prefix(k), of_prefix(v), causal=False)
        # Both to [m · t, heads, ...].
        own, own_sum = own.transpose(1, 2).flatten(0, 1), own_sum.transpose(1, 2).flatten(0, 1)
        shared, shared_sum = shared[0].transpose(0, 1), shared_sum[0].transpose(0, 1)
        weight = torch.sigmoid(own_sum - shared_sum)[..., None].to(own.dtype)
        merged = torch.lerp(shared, own, weight)
        out = torch.cat([first[0].transpose(0, 1), merged]).reshape(len(x), -1)
        return attention.o_proj(out)

    def _log_probabilities(self, x: Tensor, wanted: Tensor) -> Tensor:
        if not len(x):
            return torch.zeros(0)
        if type(self.head) is torch.nn.Linear:
            with _one_thread():
                stats = linear_token_stats(x, self.head.weight, wanted, bias=self.head.bias)
            return _of(stats)
        parts = [
            _of(token_stats(self.head(rows), labels))
            for rows, labels in zip(x.split(HEAD_ROWS), wanted.split(HEAD_ROWS), strict=True)
        ]
        return torch.cat(parts)

    def _narrowest_window(self) -> int | None:
        windows = [getattr(block.self_attn, "sliding_window", None) for block in self.blocks]
        return min((w for w in windows if w), default=None)

    def _check_length(self, tokens: int) -> None:
        most = self.model.config.max_position_embeddings
        if self.window is not None:
            most = min(most, self.window)  # within a sliding window attention is full
        if tokens > most:
            raise SaltireError(
                f"context and target are {tokens} tokens, but the scorer looks at {most}. "
                "Make the windows smaller."
            )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The op splits the vocabulary over threads and adds the parts, so its last bits depend on how
    many there are; a corpus must not depend on the number of workers, which share the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _of(stats: TokenStats) -> Tensor:
    assert stats.logprob is not None  # labels were given
    return stats.logprob


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def _flash(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention [b, heads, t, d] and the log-sums of its exponentials f32 [b, heads, t]."""
    if q.device.type == "cpu":
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return out, sums
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    if causal:
        ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    sums = scores.logsumexp(-1)
    return (scores - sums[..., None]).exp().to(v.dtype) @ v, sums
