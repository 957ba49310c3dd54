"""Entropy schedules for TRL's GRPOTrainer (trl >= 1.10; extra ``rl``).

    trainer = GRPOTrainer(...)
    EntropySchedule(StableThenAnneal(1.0, 0.1, steps=300)).attach(trainer)
    trainer.train()

A callback sees neither the trainer nor the loss, so ``attach`` does what a callback cannot: it
reads each micro-batch's entropy where the loss is computed, and token counts with it, for TRL logs
a mean of means; and it saves and restores the control with TRL's checkpoints. It changes no result
of the trainer but through the actuator.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from saltire.errors import SaltireError
from saltire.files import replacing_file
from saltire.rl.actuators import actuator as named_actuator
from saltire.rl.authority import ClipWatch, on_policy_advice
from saltire.rl.control import EntropyControl, Reading, Unit
from saltire.rl.controllers import PID, Controller
from saltire.rl.schedules import Schedule

STATE = "entropy_schedule.json"
ACTUATORS = ("clip_high", "entropy_bonus")


class EntropySchedule(TrainerCallback):
    """Keeps the entropy of a GRPOTrainer's policy on a schedule.

    schedule: a target for each optimiser step, in multiples of the first entropy measured, or nats
    with ``unit="nats"``. controller: default :class:`PID`. actuator: ``clip_high`` (the trainer's
    ``epsilon_high``; the paper's, and it needs two updates per rollout) or ``entropy_bonus`` (its
    ``entropy_coef``, which may become negative). Entropy is measured at every optimiser step and
    the actuator moved for the next. Logged beside TRL's metrics: ``entropy_target``,
    ``entropy_error`` and ``entropy_actuator``.
    """

    def __init__(
        self,
        schedule: Schedule,
        controller: Controller | None = None,
        actuator: str = "clip_high",
        *,
        low: float | None = None,
        high: float | None = None,
        unit: Unit = "initial",
    ) -> None:
        if actuator not in ACTUATORS:
            raise SaltireError(
                f"TRL's loss has no place for the actuator {actuator!r}; choose one of "
                f"{', '.join(ACTUATORS)}, or train with saltire train."
            )
        chosen = named_actuator(actuator, low=low, high=high)
        self.control = EntropyControl(schedule, controller or PID(), chosen, unit)
        self.readings: list[Reading] = []
        self._watch = ClipWatch()
        self._trainer: Any = None
        self._entropy, self._tokens, self._clipped = 0.0, 0.0, 0.0

    def attach(self, trainer: Any) -> EntropySchedule:
        """Join ``trainer``, a GRPOTrainer or one derived from it; returns the callback."""
        needed = ("_compute_loss", "_metrics", "epsilon_high", "entropy_coef", "accelerator")
        missing = [name for name in needed if not hasattr(trainer, name)]
        if missing:
            raise SaltireError(
                f"{type(trainer).__name__} has no {missing[0]}: expected a GRPOTrainer of trl 1.10 "
                "or later."
            )
        if getattr(trainer, "use_adaptive_entropy", False):
            raise SaltireError(
                "use_adaptive_entropy is on: TRL's own controller would fight the schedule. "
                "Switch one of them off."
            )
        if self._trainer is not None:
            raise SaltireError("this EntropySchedule is attached already; make one per trainer.")
        self._trainer = trainer
        if self.control.actuator.name == "clip_high" and is_on_policy(trainer.args):
            warnings.warn(on_policy_advice(), stacklevel=2)
        compute, load = trainer._compute_loss, trainer._load_optimizer_and_scheduler

        def compute_and_measure(model: Any, inputs: dict[str, Any]) -> Any:
            loss = compute(model, inputs)
            if model.training:
                self._measure(inputs)
            return loss

        def load_and_restore(checkpoint: Any) -> Any:
            result = load(checkpoint)
            if checkpoint is not None:
                self.restore(Path(checkpoint))
            return result

        trainer._compute_loss = compute_and_measure
        trainer._load_optimizer_and_scheduler = load_and_restore
        trainer.add_callback(self)
        self._apply()
        return self

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Move the actuator for the next optimiser step."""
        if not self._tokens:
            return
        entropy, clipped = self._entropy / self._tokens, self._clipped / self._tokens
        self._entropy = self._tokens = self._clipped = 0.0
        setting = self.control.setting
        reading = self.control.observe(state.global_step - 1, entropy)
        self.readings.append(reading)
        metrics = self._trainer._metrics["train"]
        metrics["entropy_target"].append(reading.target)
        metrics["entropy_error"].append(reading.error)
        metrics["entropy_actuator"].append(setting)
        if self.control.actuator.name == "clip_high":
            message = self._watch.observe(clipped, setting, self.control.actuator.high)
            if message:
                warnings.warn(message, stacklevel=2)
        self._apply()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep the control's state in the checkpoint that TRL has just written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            content = {"control": self.control.state_dict(), "watch": self._watch.state_dict()}
            with replacing_file(folder / STATE) as temporary:
                temporary.write_text(json.dumps(content))

    def restore(self, checkpoint: Path) -> None:
        """Continue where ``checkpoint`` was written."""
        path = checkpoint / STATE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            self.control.load_state_dict(content["control"])
            self._watch.load_state_dict(content["watch"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SaltireError(
                f"{path} cannot be read ({error}): the checkpoint was not written with this "
                "schedule attached. Resume without it, or start anew."
            ) from None
        self._apply()

    def _measure(self, inputs: dict[str, Any]) -> None:
        """Add the micro-batch that was just computed; its means are over all ranks already."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        trainer = self._trainer
        tokens = float(trainer.accelerator.reduce(mask.sum().to(torch.float32), reduction="sum"))
        metrics = trainer._metrics["train"]
        self._entropy += metrics["entropy"][-1] * tokens
        if metrics.get("clip_ratio/high_mean"):
            self._clipped += metrics["clip_ratio/high_mean"][-1] * tokens
        self._tokens += tokens

    def _apply(self) -> None:
        if self.control.actuator.name == "clip_high":
            self._trainer.epsilon_high = self.control.setting
        else:
            self._trainer.entropy_coef = self.control.setting
            self._trainer._entropy_bonus_enabled = True


def is_on_policy(args: Any) -> bool:
    """Does each rollout get one update only, so that the clip has nothing to act on?"""
    generations = args.steps_per_generation or args.gradient_accumulation_steps
    return args.num_iterations == 1 and generations <= args.gradient_accumulation_steps
