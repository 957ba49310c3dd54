"""From settings to a trainer's parts: model, tokenizer, task, optimiser, control."""

from __future__ import annotations

import copy
import math

import torch
from transformers import PreTrainedModel

from saltire.errors import SaltireError
from saltire.models.loading import load_model
from saltire.rl.checkpoint import trained, whole
from saltire.rl.config import TaskConfig, TrainConfig, make_actuator, make_controller, make_schedule
from saltire.rl.control import EntropyControl
from saltire.rl.distributed import default_device, shard, world_size
from saltire.rl.lora import add_lora
from saltire.rl.policy import Policy
from saltire.rl.prompts import Codec
from saltire.rl.rollout import TransformersRollout
from saltire.rl.tasks import Task, arithmetic, countdown, read_task
from saltire.rl.trainer import Parts, Trainer


def make_task(config: TaskConfig) -> Task:
    """The task that the settings describe."""
    if config.kind == "file":
        return read_task(config.path, config.reward, config.rows)
    if config.kind == "countdown":
        return countdown(config.rows, config.numbers, config.largest, config.seed, config.terse)
    return arithmetic(config.rows, config.digits, config.seed)


def make_control(config: TrainConfig, ceiling: float = math.inf) -> EntropyControl | None:
    """The control of entropy, or None where no schedule is set."""
    schedule = make_schedule(config.entropy.schedule, config.steps)
    if schedule is None:
        return None
    return EntropyControl(
        schedule,
        make_controller(config.entropy.controller),
        make_actuator(config.entropy.actuator),
        config.entropy.unit,
        ceiling,
    )


def make_trainer(
    config: TrainConfig, model: PreTrainedModel | None = None, tokenizer: object | None = None
) -> Trainer:
    """A trainer by the settings; a model in hand (with its tokenizer) saves loading it."""
    if model is None or tokenizer is None:
        model, tokenizer = load_model(config.model)
    return Trainer(config, make_parts(config, model, tokenizer))


def make_parts(config: TrainConfig, model: PreTrainedModel, tokenizer: object) -> Parts:
    """Put adapters on, shard over the ranks, and join the model to task, optimiser and control."""
    device = default_device()
    model = model.to(device)
    model.config.use_cache = True
    reference = None
    if config.lora is not None:
        add_lora(model, config.lora, config.seed)
    elif config.update.kl_coefficient:
        reference = Policy(copy.deepcopy(model)).requires_grad_(False)
    policy = Policy(model)
    sampled, refresh = model, lambda: None
    if world_size() > 1:
        # Ranks generate for different lengths of time, and so cannot share a sharded model. Each
        # keeps a whole copy of the weights to sample from, refreshed before every rollout.
        sampled = copy.deepcopy(model).requires_grad_(False)
        shard(policy, list(model.get_decoder().layers))
        if reference is not None:
            shard(reference, list(reference.model.get_decoder().layers))

        def refresh() -> None:
            copies = dict(sampled.named_parameters())
            with torch.no_grad():
                for name, parameter in trained(model):
                    copies[name].copy_(whole(parameter))

    codec = Codec(tokenizer, config.task.instruction)
    train, held_out = make_task(config.task).split(config.task.held_out)
    parameters = [parameter for _, parameter in trained(policy)]
    if not parameters:
        raise SaltireError(
            "the model has no weights that can be trained; a quantised model needs lora settings."
        )
    return Parts(
        policy,
        torch.optim.AdamW(
            parameters,
            lr=config.update.learning_rate,
            betas=config.update.betas,
            weight_decay=config.update.weight_decay,
        ),
        codec,
        train,
        held_out,
        TransformersRollout(sampled, codec.stop, codec.pad, config.rollout.batch),
        make_control(config, policy.max_entropy),
        reference,
        refresh,
    )
