"""The trainer: rollouts, rewards, control of entropy, updates; checkpoints that resume bit for bit.

One step:

1. sample a group of completions for each prompt, and reward them;
2. score them: the old log-probs, and the entropy, averaged over all tokens of all ranks;
3. let the controller move the actuator, with that entropy and the schedule's target;
4. update, ``minibatches`` · ``epochs`` times, with the knobs so set.

Entropy is measured before the updates that it steers, so the loop has no delay of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.files import replacing_file
from saltire.progress import track
from saltire.rl import checkpoint
from saltire.rl.actuators import Knobs
from saltire.rl.authority import Authority, ClipWatch
from saltire.rl.collect import Batch, Collector
from saltire.rl.config import TrainConfig
from saltire.rl.control import EntropyControl, EntropyMeter, Reading
from saltire.rl.curriculum import Curriculum
from saltire.rl.distributed import all_sum, barrier, part_of, rank
from saltire.rl.lora import without_lora
from saltire.rl.losses import group_advantages, informative
from saltire.rl.plant import measure_authority
from saltire.rl.policy import Policy, Sequences
from saltire.rl.prompts import Codec, pass_counts, pass_record
from saltire.rl.rollout import Rollout
from saltire.rl.runlog import LOG, RunLog
from saltire.rl.schedules import phase_of
from saltire.rl.step import Experience, UpdateConfig, UpdateStats, score, update
from saltire.rl.tasks import Task
from saltire.rl.top_entropy import on_top_entropy

CHECKPOINTS, SETTINGS = "checkpoints", "settings.json"


@dataclass
class Parts:
    """What a trainer works on; :func:`saltire.rl.setup.make_parts` makes it from settings.

    ``refresh`` gives the rollout the policy's present weights, where it does not share them.
    ``reference`` is the frozen policy of a KL term; without one, LoRA's base takes its place.
    """

    policy: Policy
    optimiser: torch.optim.Optimizer
    codec: Codec
    train: Task
    held_out: Task
    rollout: Rollout
    control: EntropyControl | None = None
    reference: Policy | None = None
    refresh: Callable[[], None] = lambda: None


class Trainer:
    """Trains ``parts`` by ``config`` and writes to ``config.output``."""

    def __init__(self, config: TrainConfig, parts: Parts) -> None:
        self.config, self.parts = config, parts
        self.folder = Path(config.output)
        self.collector = Collector(
            parts.train,
            parts.codec,
            parts.rollout,
            Curriculum(len(parts.train.rows), config.seed, config.curriculum),
            config.rollout,
            config.seed,
        )
        self.watch = ClipWatch()
        self.authority: Authority | None = None
        self.last_pass: float | None = None
        self.messages: list[str] = []

    def run(
        self, resume: bool = False, on_step: Callable[[dict[str, Any]], None] | None = None
    ) -> list[dict[str, Any]]:
        """Train to the last step; return this call's log records.

        ``on_step`` gets each record as it is logged, in place of a progress bar.
        Raises SaltireError if the output holds a run and ``resume`` is false, or if the run to
        resume had other settings.
        """
        start = self.resume() if resume else 0
        if not resume and (self.folder / LOG).exists():
            raise SaltireError(
                f"{self.folder} holds a run already; resume it with --resume, or choose another "
                "output."
            )
        barrier()  # or a late rank would find the log that rank 0 is about to begin
        if rank() == 0:
            with replacing_file(self.folder / SETTINGS) as temporary:
                temporary.write_text(json.dumps(dataclasses.asdict(self.config), indent=2))
        log = RunLog(self.folder, start, self.config.tensorboard) if rank() == 0 else None
        records = []
        try:
            steps = range(start, self.config.steps)
            for step in steps if on_step is not None else track(steps, "training"):
                records.append(self.step(step))
                if log is not None:
                    log.write(records[-1])
                if on_step is not None:
                    on_step(records[-1])
                if self._due(step, self.config.checkpoint.every):
                    self.save(step + 1)
        finally:
            if log is not None:
                log.close()
        return records

    def step(self, step: int) -> dict[str, Any]:
        """One step, as the module says; returns its log record."""
        began = time.perf_counter()
        # Our own randomness is counted, not drawn; this is for a model's dropout, say.
        torch.manual_seed(self.config.seed * 1_000_003 + step * 1_009 + rank())
        control, temperature = self.parts.control, self.temperature
        phase = "stable" if control is None else phase_of(control.schedule, step)
        self.parts.refresh()
        batch = self.collector.collect(step, phase, temperature)
        batch = dataclasses.replace(batch, sequences=batch.sequences.to(self.device))
        old, entropies, entropy = self.measure(batch.sequences)
        experience = self.experience(batch, old, entropies)
        if step == 0 and control is not None and self.config.entropy.probe:
            self.probe(experience)
        reading, knobs = None, self.knobs
        if control is not None:
            reading = control.observe(step, entropy, self.last_pass)
            # The ratio is between distributions at the temperature that sampled: a new setting
            # of the temperature is for the next rollouts.
            knobs = dataclasses.replace(control.knobs(knobs), temperature=temperature)
        stats = self.learn(experience, knobs, step)
        self.collector.observe(batch)
        record = self._record(step, batch, entropy, reading, stats)
        self._watch(record)
        if self._due(step, self.config.evaluation.every):
            record |= self.evaluate()
        record["seconds"] = time.perf_counter() - began
        return record

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.parts.policy.parameters()).device

    @property
    def knobs(self) -> Knobs:
        """The settings' knobs, before any actuator."""
        config = self.config.update
        return Knobs(config.clip_low, config.clip_high, temperature=self.temperature)

    @property
    def temperature(self) -> float:
        """The temperature of the next rollouts."""
        control = self.parts.control
        if control is not None and control.actuator.name == "temperature":
            return control.setting
        return self.config.rollout.temperature

    def measure(self, sequences: Sequences) -> tuple[Tensor, Tensor, float]:
        """The present policy's log-probs and entropies, f32 [B, S], and its mean entropy over all
        ranks."""
        config = self.config.update
        logprob, entropy = score(
            self.parts.policy, sequences, self.temperature, config.micro_batch, config.bf16
        )
        meter = EntropyMeter()
        meter.add(entropy, sequences.action)
        return logprob, entropy, meter.mean()

    def experience(self, batch: Batch, old: Tensor, entropy: Tensor) -> Experience:
        """Group advantages and, with a KL term, the reference's log-probs."""
        config = self.config.update
        advantages = group_advantages(batch.rewards, config.algorithm).flatten().to(self.device)
        if config.top_entropy < 1:
            action = batch.sequences.action
            advantages = on_top_entropy(advantages, entropy, action, config.top_entropy)
        reference = None
        if config.kl_coefficient:
            with self._reference() as policy:
                reference, _ = score(
                    policy, batch.sequences, self.temperature, config.micro_batch, config.bf16
                )
        return Experience(batch.sequences, advantages, old, reference)

    def learn(self, experience: Experience, knobs: Knobs, step: int) -> list[UpdateStats]:
        """All updates on one rollout: each epoch goes through the mini-batches in order.

        A mini-batch holds every ``minibatches``-th group, so that it is the same set of groups
        however they are spread over ranks.
        """
        config = self.config.update
        warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
        for group in self.parts.optimiser.param_groups:
            group["lr"] = config.learning_rate * warm
        how = UpdateConfig(
            config.algorithm,
            config.micro_batch,
            config.max_grad_norm,
            config.kl_coefficient,
            self.config.rollout.max_new_tokens,
            config.bf16,
        )
        groups = torch.arange(len(experience.sequences.tokens), device=self.device)
        part_of_row = groups // self.config.rollout.samples % config.minibatches
        parts = [
            experience.rows((part_of_row == part).nonzero().flatten())
            for part in range(config.minibatches)
        ]
        return [
            update(self.parts.policy, self.parts.optimiser, part, knobs, how)
            for _ in range(config.epochs)
            for part in parts
        ]

    def probe(self, experience: Experience) -> Authority | None:
        """Measure the actuator's authority on these rollouts; everything is left as it was."""
        control = self.parts.control
        assert control is not None
        actuator = control.actuator
        self.authority = measure_authority(
            self.parts.policy,
            self.parts.optimiser,
            control,
            self.config.update.updates_per_rollout,
            lambda setting: void(
                self.learn(experience, actuator.apply(self.knobs, setting), self.config.steps)
            ),
            lambda: self.measure(experience.sequences)[2],
        )
        if self.authority is not None and self.authority.advice:
            self.messages.append(self.authority.advice)
        return self.authority

    def evaluate(self) -> dict[str, float]:
        """Pass@k on held-out prompts at temperature 1, over all ranks."""
        config = self.config.evaluation
        self.parts.refresh()
        counts = pass_counts(
            self.parts.held_out,
            self.parts.codec,
            self.parts.rollout,
            part_of(range(min(config.prompts, len(self.parts.held_out.rows)))),
            config.samples,
            self.config.rollout.max_new_tokens,
            self.config.seed,
        )
        record = pass_record(counts, config.ks)
        self.last_pass = record[f"pass@{config.plateau_k}"]
        return record

    def save(self, step: int) -> None:
        """Write the checkpoint from which step ``step`` can start; every rank must call it."""
        control = self.parts.control
        checkpoint.save(
            self.folder / CHECKPOINTS,
            step,
            self.parts.policy,
            self.parts.optimiser,
            {
                "settings": self.config.that_matter(),
                "control": None if control is None else control.state_dict(),
                "curriculum": self.collector.curriculum.state_dict(),
                "watch": self.watch.state_dict(),
                "last_pass": self.last_pass,
            },
            self.config.checkpoint.keep,
        )

    def resume(self) -> int:
        """Take up the newest checkpoint, if there is one; returns the step to start with."""
        path = checkpoint.latest(self.folder / CHECKPOINTS)
        if path is None:
            return 0
        state = checkpoint.load(path, self.parts.policy, self.parts.optimiser)
        self.config.check_same(state["settings"], str(path))
        if self.parts.control is not None:
            self.parts.control.load_state_dict(state["control"])
        self.collector.curriculum.load_state_dict(state["curriculum"])
        self.watch.load_state_dict(state["watch"])
        self.last_pass = state["last_pass"]
        return int(state["step"])

    @contextlib.contextmanager
    def _reference(self) -> Iterator[Policy]:
        if self.parts.reference is not None:
            yield self.parts.reference
        else:
            with without_lora(self.parts.policy):
                yield self.parts.policy

    def _record(
        self,
        step: int,
        batch: Batch,
        entropy: float,
        reading: Reading | None,
        stats: list[UpdateStats],
    ) -> dict[str, Any]:
        sums = all_sum(
            [
                float(batch.rewards.sum()),
                float(batch.passes.sum()),
                float(batch.stopped.sum()),
                float(batch.sequences.lengths.sum()),
                float(informative(batch.rewards).sum()),
            ]
        )
        completions = self.config.rollout.prompts * self.config.rollout.samples
        record: dict[str, Any] = {"step": step, "entropy": entropy}
        if reading is not None:
            record |= {
                "target": reading.target,
                "error": reading.error,
                "actuator": reading.setting,
                "saturated": reading.saturated,
                "phase": reading.phase,
            }
        names = ("reward", "pass_rate", "stopped", "length")
        record |= {name: sums[i] / completions for i, name in enumerate(names)}
        record["informative"] = sums[4] / self.config.rollout.prompts
        for name in ("loss", "clipped_high", "clipped_low", "kl", "grad_norm"):
            record[name] = sum(getattr(s, name) for s in stats) / len(stats)
        record["ratio_max"] = max(s.ratio_max for s in stats)
        return record

    def _watch(self, record: dict[str, Any]) -> None:
        control = self.parts.control
        if control is not None and control.actuator.name == "clip_high":
            message = self.watch.observe(
                record["clipped_high"], control.setting, control.actuator.high
            )
            if message:
                self.messages.append(message)

    def _due(self, step: int, every: int) -> bool:
        """After this step? ``every`` = 0 means only after the last."""
        return step + 1 == self.config.steps or bool(every and (step + 1) % every == 0)


def void(_: object) -> None:
    """Drop a result where a function must return nothing."""
