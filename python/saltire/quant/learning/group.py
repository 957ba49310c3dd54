"""Learning the transform of linears that share an input, by the error of their outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saltire.nn.linear_format import LinearFormat
from saltire.processes import average_over_all
from saltire.quant.gptq import choose_grid
from saltire.quant.learning.straight_through import round_tokens, round_weights
from saltire.quant.recipe import Recipe
from saltire.quant.transforms import Transform
from saltire.reference.lowbit_gemm import SYMMETRIC_ZERO
from saltire.reference.transform_quantize import hadamard_matrix

BATCH, HELD_OUT, CHECK_EVERY, PATIENCE = 256, 512, 10, 3


@dataclass(frozen=True)
class Rounding:
    """What the transform is learned for.

    act_clip: where the clip of the input starts, or None for an input that is not clipped;
    weight_clip: where those of the weights start, float [N, K / G].
    """

    weight_bits: int
    act_bits: int
    group: int
    act_clip: float | None
    weight_clip: Tensor

    @classmethod
    def of(
        cls, start: Transform, weight: Tensor, format: LinearFormat, recipe: Recipe, clip: float
    ) -> Rounding:
        """Clips start where they are best for the transform that learning starts from, that of the
        input at ``clip``. Weights: float32 [N, K]."""
        bits, G = format.weight_bits, format.group or weight.shape[1]
        turned = start.weights(weight)
        even = torch.ones(weight.shape[1])  # near enough for a start: a rotation evens inputs out
        grid = choose_grid(turned, even, bits, format.group, False, torch.float32, recipe.clip)
        top = 2**bits - 1 - SYMMETRIC_ZERO[bits]
        whole = turned.view(len(weight), -1, G).abs().amax(-1)
        kept = grid.scale * top / whole.clamp_min(1e-30)
        unclipped = format.act_bits == 8 or not recipe.clip
        return cls(bits, format.act_bits, format.group, None if unclipped else clip, kept)


@dataclass(frozen=True)
class LearnedTransform:
    """transform and clip: those with the least held-out error; clip is None where the start was
    best, or nothing is clipped. losses: on held-out tokens, the squared error over the squared
    output, at the start and at every check."""

    transform: Transform
    clip: float | None
    losses: tuple[float, ...]


class _Parameters:
    """log D, the dense factors, and the clips, as leaves that an optimiser moves.

    Orthogonal factors are start·cayley(S), S skew: cayley(S) = (I - S)⁻¹(I + S) is orthogonal for
    every skew S and the identity at 0, so they stay exact rotations and start where they were.
    """

    def __init__(
        self, start: Transform, rounding: Rounding, orthogonal: bool, diagonal: bool
    ) -> None:
        self.start, self.orthogonal = start, orthogonal
        self.log_d = start.diagonal.float().log().requires_grad_(diagonal)
        self.factors = {
            name: (torch.zeros_like(factor) if orthogonal else factor.clone().float())
            .contiguous()
            .requires_grad_()
            for name in ("left", "right")
            if (factor := getattr(start, name)) is not None
        }
        clip = rounding.act_clip
        self._act_clip = None if clip is None else _logit(torch.tensor(clip)).requires_grad_()
        self._weight_clip = _logit(rounding.weight_clip).requires_grad_()
        B = start.hadamard
        self.hadamard = hadamard_matrix(B).float() if start.right is None and B > 1 else None

    def all(self) -> list[Tensor]:
        log_d = [self.log_d] if self.log_d.requires_grad else []
        clip = [] if self._act_clip is None else [self._act_clip]
        return [*log_d, *self.factors.values(), *clip, self._weight_clip]

    @property
    def act_clip(self) -> Tensor | None:
        return None if self._act_clip is None else self._act_clip.sigmoid()

    @property
    def weight_clip(self) -> Tensor:
        return self._weight_clip.sigmoid()

    def factor(self, name: str) -> Tensor | None:
        moved = self.factors.get(name)
        if moved is None:
            return None
        if not self.orthogonal:
            return moved
        skew = moved - moved.T
        eye = torch.eye(len(skew))
        start: Tensor = getattr(self.start, name)
        return start.float() @ torch.linalg.solve(eye - skew, eye + skew)

    def transform(self) -> Transform:
        left, right = self.factor("left"), self.factor("right")
        return Transform(
            self.log_d.detach().exp(),
            self.start.hadamard,
            None if left is None else left.detach().contiguous(),
            None if right is None else right.detach().contiguous(),
        )

    def both(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """T(x) and V(weight), differentiable."""
        left, right, d = self.factor("left"), self.factor("right"), self.log_d.exp()
        dual_left, dual_right = left, right
        if not self.orthogonal:
            dual_left = None if left is None else torch.linalg.inv(left).T
            dual_right = None if right is None else torch.linalg.inv(right).T
        mix = self.hadamard if right is None else right
        dual_mix = self.hadamard if right is None else dual_right
        return _mixed(x / d, left, mix), _mixed(weight * d, dual_left, dual_mix)


def _logit(share: Tensor) -> Tensor:
    return share.clamp(0.01, 0.995).logit()


def _mixed(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    shape = x.shape
    if right is not None:
        x = x.reshape(shape[0], -1, right.shape[0]) @ right
    if left is not None:
        x = left.T @ x.reshape(shape[0], left.shape[0], -1)
    return x.reshape(shape)


def learn_transform(
    x: Tensor,
    weight: Tensor,
    start: Transform,
    rounding: Rounding,
    *,
    steps: int,
    rate: float,
    orthogonal: bool,
    diagonal: bool = True,
    seed: int = 0,
) -> LearnedTransform:
    """Move a transform so that ``Q(T(x))·Q(V(w))ᵀ`` comes nearer to ``x·wᵀ``.

    loss = ‖Q(T(x))·Q(V(w))ᵀ - x·wᵀ‖² / ‖x·wᵀ‖² over tokens drawn at random, through both roundings
    (straight through; weights to the nearest symmetric level). Moved are log D (unless ``diagonal``
    is false), the dense factors (``orthogonal``: by Cayley's map, else freely), the clip of the
    input and those of the weights; the latter only go along, as GPTQ's grid is searched anew.
    AdamW, cosine. Tokens held out say which step was the best and when to stop: what comes back is
    never worse on them than the start. Several processes average their losses and gradients. x:
    float32 [tokens, K]; weight: float32 [N, K].
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    cut = min(HELD_OUT, max(1, len(x) // 8))
    held, rest = order[:cut], order[cut:] if len(x) > 1 else order
    parameters = _Parameters(start, rounding, orthogonal, diagonal)
    optimiser = torch.optim.AdamW(parameters.all(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(1, steps), rate / 100)

    def loss(rows: Tensor) -> Tensor:
        tokens = x[rows]
        rotated, turned = parameters.both(tokens, weight)
        clip = parameters.act_clip
        rounded = round_tokens(rotated, rounding.act_bits, 1.0 if clip is None else clip)
        kept = parameters.weight_clip
        got = rounded @ round_weights(turned, rounding.weight_bits, rounding.group, kept).T
        want = tokens @ weight.T
        return (got - want).square().sum() / want.square().sum().clamp_min(1e-30)

    losses: list[float] = []
    best, best_clip, worse = start, None, 0
    for step in range(steps + 1):
        if step % CHECK_EVERY == 0 or step == steps:
            with torch.no_grad():
                value = loss(held)
                average_over_all([value])
                now = float(value)
            if not losses or now < min(losses):
                if losses:
                    best = parameters.transform()
                    clip = parameters.act_clip
                    best_clip = None if clip is None else float(clip.detach())
                worse = 0
            else:
                worse += 1
            losses.append(now)
            if worse == PATIENCE or step == steps:
                break
        with torch.enable_grad():
            size = min(BATCH, len(rest))
            picked = rest[torch.randint(0, len(rest), (size,), generator=generator)]
            value = loss(picked)
        optimiser.zero_grad()
        value.backward()
        average_over_all([p.grad for p in parameters.all() if p.grad is not None])
        optimiser.step()
        schedule.step()
    return LearnedTransform(best, best_clip, tuple(losses))
