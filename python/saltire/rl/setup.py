"""From settings to a trainer's parts: model, tokenizer, task, optimiser, control."""

from __future__ import annotations

import copy
import math

import torch
from transformers import PreTrainedModel

from saltire.errors import SaltireError
from saltire.models.loading import load_model
from saltire.rl.checkpoint import trained
from saltire.rl.config import TaskConfig, TrainConfig, make_actuator, make_controller, make_schedule
from saltire.rl.control import EntropyControl
from saltire.rl.distributed import default_device, shard
from saltire.rl.engines import make_rollout, plain_copy, runs_on_decoder
from saltire.rl.lora import add_lora
from saltire.rl.policy import Policy
from saltire.rl.prompts import Codec
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
    codec = Codec(tokenizer, config.task.instruction)
    on_decoder = runs_on_decoder(config.rollout, model)
    reference = plain = None
    if config.lora is not None:
        plain = plain_copy(model, config.lora) if on_decoder else None
        add_lora(model, config.lora, config.seed)
    elif config.update.kl_coefficient:
        reference = Policy(copy.deepcopy(model)).requires_grad_(False)
    policy = Policy(model)
    rollout, refresh = make_rollout(config.rollout, model, plain, on_decoder, codec)
    for whole_policy in (policy, reference):
        if whole_policy is not None:
            shard(whole_policy, list(whole_policy.model.get_decoder().layers))
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
        rollout,
        make_control(config, policy.max_entropy),
        reference,
        refresh,
    )
