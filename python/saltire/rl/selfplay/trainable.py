"""A policy that is trained, and the model that generates for it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from saltire.errors import SaltireError
from saltire.rl.checkpoint import trained, whole
from saltire.rl.config import (
    EntropyConfig,
    LoraConfig,
    OptimiserConfig,
    make_actuator,
    make_controller,
    make_schedule,
)
from saltire.rl.control import EntropyControl
from saltire.rl.distributed import default_device, shard, world_size
from saltire.rl.lora import add_lora
from saltire.rl.policy import Policy


@dataclass(frozen=True)
class Trainable:
    """A policy with its optimiser. sampled: the model to generate with; ``refresh`` gives it the
    policy's present weights, where it does not share them."""

    policy: Policy
    optimiser: torch.optim.Optimizer
    sampled: PreTrainedModel
    refresh: Callable[[], None]


def make_trainable(
    model: PreTrainedModel, update: OptimiserConfig, lora: LoraConfig | None, seed: int
) -> Trainable:
    """Put adapters on, shard over the ranks, and make the optimiser."""
    device = default_device()
    model = model.to(device)
    model.config.use_cache = True
    if lora is not None:
        add_lora(model, lora, seed)
    policy = Policy(model)
    sampled, refresh = model, lambda: None
    if world_size() > 1:
        # Ranks generate for different lengths of time, and so cannot share a sharded model. Each
        # keeps a whole copy of the weights to sample from, refreshed before every rollout.
        sampled = copy.deepcopy(model).requires_grad_(False)
        shard(policy, list(model.get_decoder().layers))

        def refresh() -> None:
            copies = dict(sampled.named_parameters())
            with torch.no_grad():
                for name, parameter in trained(model):
                    copies[name].copy_(whole(parameter))

    parameters = [parameter for _, parameter in trained(policy)]
    if not parameters:
        raise SaltireError(
            "the model has no weights that can be trained; a quantised model needs lora settings."
        )
    optimiser = torch.optim.AdamW(
        parameters,
        lr=update.learning_rate,
        betas=update.betas,
        weight_decay=update.weight_decay,
    )
    return Trainable(policy, optimiser, sampled, refresh)


def control_of(
    config: EntropyConfig, steps: int, ceiling: float = math.inf
) -> EntropyControl | None:
    """The control of entropy over a run of ``steps``, or None where no schedule is set."""
    schedule = make_schedule(config.schedule, steps)
    if schedule is None:
        return None
    return EntropyControl(
        schedule,
        make_controller(config.controller),
        make_actuator(config.actuator),
        config.unit,
        ceiling,
    )
