"""The end-to-end step: scales, diagonals and biases of the quantised model, against its teacher.

The codes of the weights stay, so a packed checkpoint holds the result exactly and runs as fast.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from saltire.models.adapters import Adapter
from saltire.nn.quant_linear import QuantLinear
from saltire.processes import average_over_all, sum_over_all, world_size
from saltire.progress import track
from saltire.quant.layer import put
from saltire.quant.learning.losses import Loss, token_loss
from saltire.quant.learning.tuned_linear import TunedInput, TunedLinear

WINDOW = 512  # tokens of one step: enough context, and activations that fit in memory
VOCABULARY = 8192  # candidates among which the losses compare teacher and student
CHUNK = 256  # tokens whose logits are held at once
PATIENCE = 2  # checks without gain before it stops
MEMORY = 0.8  # of the mean of the parameters: some five steps
NOISE = 0.15  # share by which the loss of one held-out window differs by chance alone


@dataclass(frozen=True)
class Teacher:
    """What the model says before it is quantised.

    windows: int64 [n, L], the text in the pieces that are learned from. hidden: float32 [n, L, D],
    what the head reads on them. head: float32 [V', D], rows of the tokens that the teacher finds
    likeliest on this text; bias [V'] or None.
    """

    windows: Tensor
    hidden: Tensor
    head: Tensor
    bias: Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, adapter: Adapter, tokens: Tensor) -> Teacher:
        """Runs the model over tokens, int64 [samples, T], in windows of at most 512.

        A head of 8,192 of the 49,152 tokens costs a sixth, and holds nearly all of the probability:
        those with the largest sum of probabilities over a sample of positions. Several processes
        each bring their own tokens and agree on the candidates.
        """
        length = min(WINDOW, tokens.shape[1])
        windows = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
        base, rows = model.base_model, track(windows.split(1), "asking the teacher")
        hidden = torch.cat([base(row, use_cache=False)[0].float() for row in rows])
        head = model.get_submodule(adapter.head_path)
        weight, bias = head.weight.detach().float(), getattr(head, "bias", None)
        if len(weight) > VOCABULARY:
            probe = hidden.flatten(0, 1)[:: max(1, hidden.shape[0] * hidden.shape[1] // 512)]
            likely = torch.zeros(len(weight))
            for part in probe.split(64):
                likely += torch.nn.functional.linear(part, weight, bias).softmax(-1).sum(0)
            likely[tokens.unique()] += 1.0  # the tokens of the text are candidates themselves
            likely = sum_over_all(likely)
            keep = likely.topk(VOCABULARY).indices.sort().values
            weight = weight[keep]
            bias = None if bias is None else bias[keep]
        return cls(windows, hidden, weight.clone(), bias)


@dataclass(frozen=True)
class Tuned:
    """losses: on held-out windows, before and after each epoch, of the mean of the parameters."""

    losses: tuple[float, ...]


def tune(
    model: PreTrainedModel,
    adapter: Adapter,
    teacher: Teacher,
    *,
    epochs: int,
    rate: float,
    loss: Loss = "kl",
    learn_bias: bool = True,
    seed: int = 0,
) -> Tuned:
    """Learn scales, diagonals and biases of every quantised linear, codes fixed; in place.

    AdamW with a cosine, one window of 512 tokens a step. What is judged and kept is the mean of the
    parameters over the last steps: a step flips many activations' codes, so that one set of
    parameters is better or worse than the next by chance, and their mean is better than most. One
    window in eight is held out (at least one), measured with KL after every epoch. A later epoch
    counts as better unless its loss is above the best one by more than chance. Several processes
    learn from a window each, average what they found, and end with the same bits.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(teacher.windows)
    cut = max(1, n // 8)
    held, train = range(min(cut, n)), range(cut if n > 1 else 0, n)
    tuned = _install(model, adapter, learn_bias)
    inputs = list(dict.fromkeys(layer.shared for layer in tuned.values()))
    branches = [layer.branch for layer in tuned.values() if layer.branch is not None]
    parameters = [
        p for module in (*tuned.values(), *inputs, *branches)
        for p in module.parameters(recurse=False) if p.requires_grad
    ]  # fmt: skip
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * len(train), rate / 20)

    def distance(window: int, kind: Loss, learning: bool) -> float:
        for shared in inputs:
            shared.forget()
        with torch.set_grad_enabled(learning):
            hidden = model.base_model(teacher.windows[window][None], use_cache=False)[0][0]
        return _backward(hidden, teacher.hidden[window], teacher, kind, learning)

    kept = [p.detach().clone() for p in parameters]
    mean = [p.detach().clone() for p in parameters]
    frozen = [p for p in model.parameters() if p.requires_grad]
    learned = {id(p) for p in parameters}
    for p in frozen:
        p.requires_grad_(id(p) in learned)
    try:
        losses = [_mean(distance(w, "kl", False) for w in held)]
        worse = 0
        for epoch in range(epochs):
            order = torch.randperm(len(train), generator=generator).tolist()
            for index in track(order, f"learning end to end, epoch {epoch + 1} of {epochs}"):
                optimiser.zero_grad()
                distance(train[index], loss, True)
                average_over_all([p.grad for p in parameters if p.grad is not None])
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()
                schedule.step()
                for average, p in zip(mean, parameters, strict=True):
                    average.lerp_(p.detach(), 1 - MEMORY)
            _swap(parameters, mean)
            losses.append(_mean(distance(w, "kl", False) for w in held))
            better = losses[-1] <= min(losses) * (1 + NOISE / (len(held) * world_size()) ** 0.5)
            if better:
                kept = [p.detach().clone() for p in parameters]
            _swap(parameters, mean)
            worse = 0 if better else worse + 1
            if worse == PATIENCE:
                break
    finally:
        for p in frozen:
            p.requires_grad_(True)
        for p, value in zip(parameters, kept, strict=True):
            p.data = value
        for name, layer in tuned.items():
            put(model, name, layer.result())
    return Tuned(tuple(losses))


def _swap(parameters: list[torch.nn.Parameter], others: list[Tensor]) -> None:
    for parameter, other in zip(parameters, others, strict=True):
        parameter.data, other.data = other.data, parameter.data


def _install(model: PreTrainedModel, adapter: Adapter, learn_bias: bool) -> dict[str, TunedLinear]:
    """Put a TunedLinear in the place of every plain QuantLinear of the blocks."""
    made = {}
    for index, block in enumerate(adapter.blocks(model)):
        for group in adapter.groups:
            members = {name: block.get_submodule(name) for name in group}
            plain = {n: m for n, m in members.items() if isinstance(m, QuantLinear)}
            if len(plain) < len(members):
                continue
            shared = TunedInput(next(iter(plain.values())))
            for name, member in plain.items():
                full = f"{adapter.blocks_path}.{index}.{name}"
                made[full] = TunedLinear(member, shared, learn_bias)
                put(model, full, made[full])
    return made


def _backward(hidden: Tensor, want: Tensor, teacher: Teacher, kind: Loss, learning: bool) -> float:
    """The loss, mean over tokens; with ``learning``, its gradient is sent back through ``hidden``.

    Logits of a chunk of tokens at a time, so that they never exist all at once.
    """
    total, pieces = 0.0, []
    for part, goal in zip(hidden.detach().split(CHUNK), want.split(CHUNK), strict=True):
        with torch.set_grad_enabled(learning):
            leaf = part.clone().requires_grad_(learning)
            student = torch.nn.functional.linear(leaf, teacher.head, teacher.bias)
            target = torch.nn.functional.linear(goal, teacher.head, teacher.bias)
            value = token_loss(student, target, kind) * (len(part) / len(hidden))
            total += float(value.detach())
            if learning:
                (gradient,) = torch.autograd.grad(value, leaf)
                pieces.append(gradient)
    if learning:
        hidden.backward(torch.cat(pieces))
    return total


def _mean(values: Iterable[float]) -> float:
    """Over the values of all processes."""
    found = torch.tensor(list(values), dtype=torch.float64).mean()
    average_over_all([found])
    return float(found)
