"""Log-prob, entropy and log-sum-exp of tokens, with gradients (room ``csrc/token_stats``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops import library  # noqa: F401  (loads torch.ops.saltire)

IGNORE_INDEX = -100


@dataclass(frozen=True)
class TokenStats:
    """Statistics of each token's next-token distribution; all of shape [...], f32 but ``argmax``.

    logprob: ln p of the label, in nats, None without labels. entropy: in nats, in [0, ln V].
    logsumexp: ln Σ e^z. These three carry gradients. argmax: int64, the lowest of equals, counted
    from ``first`` on. max_logit
    and log_sum are what merging parts of a vocabulary needs: logsumexp = max_logit + log_sum.
    """

    logprob: Tensor | None
    entropy: Tensor
    logsumexp: Tensor
    argmax: Tensor
    max_logit: Tensor
    log_sum: Tensor

    @property
    def max_prob(self) -> Tensor:
        """The probability of the likeliest token: e^(−log_sum)."""
        return (-self.log_sum).exp()


def token_stats(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    first: int = 0,
    vocabulary: int = 0,
    check: bool = True,
) -> TokenStats:
    """Statistics of softmax(cap(logits) / temperature) in one pass, each logit read once.

    cap(x) = softcap·tanh(x / softcap). Sums are of shifted logits, so the entropy keeps its digits
    near collapse and under any common offset. logits: f32, bf16 or f16 [..., V]; −∞ masks a token.
    labels: int64 [...]; where one is ``ignore_index``, statistics and gradients are 0.
    temperature: a number, or f32 [...]; no gradient goes to it. first, vocabulary: these logits are
    those from index ``first`` on of a larger vocabulary, see :func:`merge_shards`.

    Raises SaltireError for a label out of range (with its index) and, unless ``check`` is false,
    for a token whose logits hold a NaN or are all masked; without the check its statistics are NaN.
    On a CUDA device the check waits for the result, and labels and temperatures are part of it.
    """
    shape, V = logits.shape[:-1], logits.shape[-1]
    try:
        raw = torch.ops.saltire.token_stats(
            logits.reshape(shape.numel(), V),
            None if labels is None else labels.reshape(-1),
            _temperature(temperature, logits),
            softcap or 0.0,
            ignore_index,
            first,
            vocabulary,
        )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    arguments = _Arguments("token_stats", labels, temperature, ignore_index, vocabulary or V)
    return _finish(raw, shape, arguments, check)


def linear_token_stats(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    first: int = 0,
    vocabulary: int = 0,
    check: bool = True,
) -> TokenStats:
    """``token_stats`` of hidden·headᵀ + bias, whose [M, V] logits are never held.

    hidden: f32, bf16 or f16 [..., D]. head: the same kinds [V, D]. bias: f32 [V]. The products are
    in f32 whatever the kinds. Gradients go to hidden, head and bias; a head that needs none
    (frozen, or under LoRA) costs none. The rest is as in :func:`token_stats`.
    """
    shape = hidden.shape[:-1]
    try:
        raw = torch.ops.saltire.linear_token_stats(
            hidden.reshape(shape.numel(), hidden.shape[-1]),
            head,
            bias,
            None if labels is None else labels.reshape(-1),
            _temperature(temperature, hidden),
            softcap or 0.0,
            ignore_index,
            first,
            vocabulary,
        )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    arguments = _Arguments(
        "linear_token_stats", labels, temperature, ignore_index, vocabulary or head.shape[0]
    )
    return _finish(raw, shape, arguments, check)


def merge_shards(shards: Sequence[TokenStats]) -> TokenStats:
    """Statistics over a vocabulary from those over its parts, in rising order of ``first``.

    With w_r = e^(logsumexp_r − logsumexp), the share of part r: H = Σ w_r·(H_r − ln w_r). No
    gradient goes through; see :func:`sharded_token_stats` for that.
    """
    max_logit = torch.stack([s.max_logit for s in shards]).detach()
    log_sum = torch.stack([s.log_sum for s in shards]).detach()
    # A part that is masked whole has no sum: NaN from its op, weight 0 here.
    empty = max_logit == -torch.inf
    largest, owner = max_logit.max(dim=0)
    shift = (max_logit - largest).masked_fill(empty, -torch.inf)
    lse = (shift + log_sum.masked_fill(empty, 0.0)).double()  # of each part, from `largest` on
    total = lse.logsumexp(dim=0)
    log_w = (lse - total).masked_fill(empty, 0.0)
    w = log_w.exp().masked_fill(empty, 0.0)
    own = torch.stack([s.entropy for s in shards]).detach().double().masked_fill(empty, 0.0)
    entropy = (w * (own - log_w)).sum(dim=0)
    logprob = None
    if all(s.logprob is not None for s in shards):
        each = torch.stack([s.logprob for s in shards if s.logprob is not None]).detach().double()
        logprob = (each.masked_fill(empty, -torch.inf) + log_w).amax(dim=0).float()
    argmax = torch.stack([s.argmax for s in shards]).gather(0, owner[None]).squeeze(0)
    return TokenStats(
        logprob, entropy.float(), (largest + total).float(), argmax, largest, total.float()
    )


class _Sharded(torch.autograd.Function):
    """Forward: local statistics, gathered and merged. Backward: local, then dh summed."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, options: Any) -> Any:
        temperature, softcap, ignore_index, first, vocabulary, group = options
        common = (temperature, softcap, ignore_index, first, vocabulary)
        own = torch.ops.saltire.linear_token_stats(hidden, head, None, labels, *common)
        floats = torch.stack([*own[:5], own[5].float()])
        parts = [torch.empty_like(floats) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, floats, group=group)
        merged = merge_shards([_as_stats(part.unbind(0)) for part in parts])
        assert merged.logprob is not None
        ignored = labels == ignore_index
        outputs = [merged.logprob, merged.entropy, merged.logsumexp]
        logprob, entropy, lse = (value.masked_fill(ignored, 0.0) for value in outputs)
        ctx.save_for_backward(hidden, head, labels, merged.max_logit, merged.log_sum, entropy)
        ctx.common, ctx.group = common, group
        argmax = merged.argmax.long()
        ctx.mark_non_differentiable(argmax, merged.max_logit, merged.log_sum)
        return logprob, entropy, lse, argmax, merged.max_logit, merged.log_sum

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, head, labels, max_logit, log_sum, entropy = ctx.saved_tensors
        dh, dw, _ = torch.ops.saltire.linear_token_stats_backward(
            hidden, head, None, labels, *ctx.common, max_logit, log_sum, entropy, *grads[:3],
            ctx.needs_input_grad[0], ctx.needs_input_grad[1], False,
        )  # fmt: skip
        if ctx.needs_input_grad[0]:
            dist.all_reduce(dh, group=ctx.group)
        return (
            dh.to(hidden.dtype) if ctx.needs_input_grad[0] else None,
            dw.to(head.dtype) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )


def sharded_token_stats(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    first: int,
    vocabulary: int,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    group: Any = None,
) -> TokenStats:
    """Vocabulary-parallel :func:`linear_token_stats`: each rank holds some rows of the head.

    head: [V_r, D], the rows from ``first`` on of ``vocabulary``; ranks in rising order of first.
    hidden [M, D] and labels [M] (of the whole vocabulary) are the same on every rank. 24 bytes a
    token are gathered; backward sums dh over the ranks. Returns the same on every rank.
    """
    options = (
        _temperature(temperature, hidden), softcap or 0.0, ignore_index, first, vocabulary, group
    )  # fmt: skip
    try:
        logprob, entropy, lse, argmax, max_logit, log_sum = _Sharded.apply(
            hidden, head, labels, options
        )
    except RuntimeError as error:
        raise SaltireError(str(error)) from None
    return TokenStats(logprob, entropy, lse, argmax, max_logit, log_sum)


def top_entropy_mask(entropy: Tensor, share: float, mask: Tensor | None = None) -> Tensor:
    """The ``share`` of tokens with the highest entropy: bool of entropy's shape.

    Only tokens where ``mask`` is true count and are chosen; of n such, ceil(share·n) are, more
    where entropies tie at the threshold. Raises SaltireError unless 0 < share <= 1.
    """
    if not 0 < share <= 1:
        raise SaltireError(f"top_entropy_mask: share is {share}; it must be above 0 and at most 1.")
    counted = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask
    values = entropy[counted]
    if values.numel() == 0:
        return counted.clone()
    kept = min(values.numel(), -int(-share * values.numel() // 1))
    threshold = values.kthvalue(values.numel() - kept + 1).values
    return counted & (entropy >= threshold)


def _temperature(temperature: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(temperature, Tensor):
        return temperature.reshape(-1)
    return torch.full((1,), temperature, dtype=torch.float32, device=like.device)


def _as_stats(parts: Sequence[Tensor]) -> TokenStats:
    logprob, entropy, lse, max_logit, log_sum, argmax = parts
    return TokenStats(logprob, entropy, lse, argmax, max_logit, log_sum)


@dataclass(frozen=True)
class _Arguments:
    """What the CPU checks before the pass, and a CUDA device marks with NaN."""

    op: str
    labels: Tensor | None
    temperature: float | Tensor
    ignore_index: int
    vocabulary: int

    def blame(self) -> None:
        """Raise SaltireError for the first argument that is out of range, as the CPU's op does."""
        t = torch.as_tensor(self.temperature, dtype=torch.float32).reshape(-1)
        for i in (~(t.isfinite() & (t > 0))).nonzero().flatten()[:1].tolist():
            raise SaltireError(
                f"{self.op}: temperature[{i}] is {float(t[i]):g}; it must be finite and above 0."
            )
        if self.labels is None:
            return
        labels = self.labels.reshape(-1)
        outside = (labels < 0) | (labels >= self.vocabulary)
        for i in (outside & (labels != self.ignore_index)).nonzero().flatten()[:1].tolist():
            raise SaltireError(
                f"{self.op}: labels[{i}] is {int(labels[i])}, outside the vocabulary of "
                f"{self.vocabulary}. Use ignore_index = {self.ignore_index} for tokens that have "
                "no label."
            )


def _finish(
    raw: Sequence[Tensor], shape: torch.Size, arguments: _Arguments, check: bool
) -> TokenStats:
    # FSDP warns of a forward that returns views; most callers have one row of tokens anyway.
    same = len(shape) == 1
    stats = _as_stats([value if same else value.view(shape) for value in raw])
    if check and not torch.compiler.is_compiling() and bool(stats.log_sum.isnan().any()):
        arguments.blame()
        token = stats.log_sum.isnan().nonzero()[0].tolist()
        raise SaltireError(
            f"token_stats: the logits of token {token if len(token) > 1 else token[0]} hold a NaN "
            "or +inf, or all are masked, so it has no distribution. Look at what computed them."
        )
    if arguments.labels is not None:
        return stats
    return TokenStats(
        None, stats.entropy, stats.logsumexp, stats.argmax, stats.max_logit, stats.log_sum
    )


def _fake_stats(tokens: Tensor) -> tuple[Tensor, ...]:
    M = tokens.shape[0]
    floats = [tokens.new_empty((M,), dtype=torch.float32) for _ in range(5)]
    return (*floats, tokens.new_empty((M,), dtype=torch.int64))


@torch.library.register_fake("saltire::token_stats")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _fake_stats(logits)


@torch.library.register_fake("saltire::token_stats_backward")
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.register_fake("saltire::linear_token_stats")
def _(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _fake_stats(hidden)


@torch.library.register_fake("saltire::linear_token_stats_backward")
def _(hidden: Tensor, head: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    (M, D), V = hidden.shape, head.shape[0]
    wants_hidden, wants_head, wants_bias = rest[-3:]
    # A device sums dW over all tokens before it stores it, and so rounds it once, there.
    kind = head.dtype if head.is_cuda else torch.float32
    return (
        hidden.new_empty((M if wants_hidden else 0, D), dtype=torch.float32),
        hidden.new_empty((V if wants_head else 0, D), dtype=kind),
        hidden.new_empty((V if wants_bias else 0,), dtype=torch.float32),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = len(inputs) - 4  # then softcap, ignore_index, first, vocabulary
    _, entropy, _, max_logit, log_sum, argmax = output
    ctx.save_for_backward(*inputs[:tensors], max_logit, log_sum, entropy)
    ctx.options = inputs[tensors:]
    ctx.mark_non_differentiable(max_logit, log_sum, argmax)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, max_logit, log_sum, entropy = ctx.saved_tensors
    grad = torch.ops.saltire.token_stats_backward(
        *inputs, *ctx.options, max_logit, log_sum, entropy, *grads[:3]
    )
    return (grad, *[None] * (len(inputs) + len(ctx.options) - 1))


def _linear_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, max_logit, log_sum, entropy = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    found = torch.ops.saltire.linear_token_stats_backward(
        *inputs, *ctx.options, max_logit, log_sum, entropy, *grads[:3], *wanted
    )
    given = [
        value.to(source.dtype) if want else None
        for value, source, want in zip(found, inputs[:3], wanted, strict=True)
    ]
    return (*given, *[None] * (len(inputs) + len(ctx.options) - 3))


torch.library.register_autograd("saltire::token_stats", _backward, setup_context=_setup)
torch.library.register_autograd(
    "saltire::linear_token_stats", _linear_backward, setup_context=_setup
)
