"""The self-play trainer: matches, advantages from their outcomes, control of entropy, updates.

One step: play the matches; score what the learner wrote (the old log-probs, and the entropy over
all ranks); turn outcomes into advantages; let the controller move its actuator; update. Advantages
are those of the estimator: nothing here centres, whitens or drops them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from saltire.errors import SaltireError
from saltire.files import replacing_file
from saltire.games import MatchRecord
from saltire.games.records import line, read_records, write_records
from saltire.progress import track
from saltire.rl import checkpoint
from saltire.rl.actuators import Knobs
from saltire.rl.authority import ClipWatch
from saltire.rl.distributed import barrier, gather, rank
from saltire.rl.plant import measure_authority
from saltire.rl.runlog import LOG, RunLog
from saltire.rl.selfplay.collect import Played, collect
from saltire.rl.selfplay.config import SelfPlayConfig, is_due
from saltire.rl.selfplay.evaluation import win_rate
from saltire.rl.selfplay.parts import SelfPlayParts
from saltire.rl.selfplay.records import control_record, match_record, update_record
from saltire.rl.selfplay.updates import Turns, learn, measure
from saltire.rl.step import Experience

CHECKPOINTS, SETTINGS, MATCHES = "checkpoints", "settings.json", "matches.jsonl"


@dataclass
class SelfPlayTrainer:
    """Trains ``parts`` by ``config`` and writes to ``config.output``: ``log.jsonl``, a line a step;
    ``matches.jsonl``, a line a match, which ``saltire play --replay`` reads; checkpoints."""

    config: SelfPlayConfig
    parts: SelfPlayParts
    messages: list[str] = field(default_factory=list)
    watch: ClipWatch = field(default_factory=ClipWatch)

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def run(self, resume: bool = False) -> list[dict[str, Any]]:
        """Train to the last step; return this call's log records.

        Raises SaltireError if the output holds a run and ``resume`` is false, or if the run to
        resume had other settings.
        """
        config = self.config
        start = self.resume() if resume else 0
        if not resume and (self.folder / LOG).exists():
            raise SaltireError(
                f"{self.folder} holds a run already; resume it with --resume, or choose another "
                "output."
            )
        barrier()  # or a late rank would find the log that rank 0 is about to begin
        log = None
        if rank() == 0:
            with replacing_file(self.folder / SETTINGS) as temporary:
                settings = {"kind": "selfplay", **dataclasses.asdict(config)}
                temporary.write_text(json.dumps(settings, indent=2))
            self._drop_matches(start)
            log = RunLog(self.folder, start, config.tensorboard)
        records = []
        try:
            for step in track(range(start, config.steps), "self-play"):
                record, matches = self.step(step)
                records.append(record)
                if log is not None:
                    log.write(record)
                    with (self.folder / MATCHES).open("a", encoding="utf-8") as file:
                        file.writelines(line(match) for match in matches)
                if is_due(step, config.checkpoint.every, config.steps):
                    self.save(step + 1)
        finally:
            if log is not None:
                log.close()
        return records

    def step(self, step: int) -> tuple[dict[str, Any], list[MatchRecord]]:
        """One step, as the module says: its log record, and the matches of all ranks."""
        began = time.perf_counter()
        config, parts = self.config, self.parts
        torch.manual_seed(config.seed * 1_000_003 + step * 1_009 + rank())
        temperature = self.temperature
        parts.learner.voice = replace(parts.learner.voice, temperature=temperature)
        parts.refresh()
        played = self._play(step)
        played_at = time.perf_counter()
        turns = Turns.of(played, parts.learner.codec.pad, parts.device)
        old, entropy = measure(parts, config, turns.sequences, temperature)
        judged_at = time.perf_counter()
        by_match = parts.estimator.advantages(played.outcomes())
        judging = time.perf_counter() - judged_at
        advantages = turns.advantages(played.by_turn(by_match))
        experience = Experience(turns.sequences, advantages, old)
        knobs, reading = self.knobs(temperature), None
        if parts.control is not None:
            if step == 0 and config.entropy.probe:
                self._probe(experience, turns, temperature)
            reading = parts.control.observe(step, entropy)
            knobs = replace(parts.control.knobs(knobs), temperature=temperature)
        stats = learn(parts, config, experience, turns.places, knobs, step)
        record = {"step": step, "entropy": entropy, **control_record(reading)}
        record |= match_record(played, parts.game.outcomes)
        record |= update_record(stats, played, advantages)
        record |= parts.estimator.report()
        self._watch_clip(record)
        if config.evaluation.every and is_due(step, config.evaluation.every, config.steps):
            record["win_rate"] = win_rate(parts, config)
        record["play_seconds"] = played_at - began
        record["advantage_seconds"] = judging
        record["seconds"] = time.perf_counter() - began
        matches = [
            replace(match, notes={"step": step})
            for match in gather(played.records + played.crashed)
        ]
        return record, matches

    @property
    def temperature(self) -> float:
        """Of the next matches."""
        control = self.parts.control
        if control is not None and control.actuator.name == "temperature":
            return control.setting
        return self.config.matches.temperature

    def knobs(self, temperature: float) -> Knobs:
        """The settings' knobs, before any actuator."""
        update = self.config.update
        return Knobs(update.clip_low, update.clip_high, temperature=temperature)

    def _probe(self, experience: Experience, turns: Turns, temperature: float) -> None:
        """Measure the actuator's authority on these matches; everything is left as it was."""
        parts, config = self.parts, self.config
        control = parts.control
        assert control is not None
        knobs = self.knobs(temperature)

        def learn_with(setting: float) -> None:
            changed = control.actuator.apply(knobs, setting)
            learn(parts, config, experience, turns.places, changed, 0)

        authority = measure_authority(
            parts.policy,
            parts.optimiser,
            control,
            config.update.updates_per_rollout,
            learn_with,
            lambda: measure(parts, config, turns.sequences, temperature)[1],
        )
        if authority is not None and authority.advice:
            self.messages.append(authority.advice)

    def save(self, step: int) -> None:
        """Write the checkpoint from which step ``step`` can start; every rank must call it."""
        parts = self.parts
        checkpoint.save(
            self.folder / CHECKPOINTS,
            step,
            parts.policy,
            parts.optimiser,
            {
                "settings": self.config.that_matter(),
                "control": None if parts.control is None else parts.control.state_dict(),
                "estimator": parts.estimator.state_dict(),
                "watch": self.watch.state_dict(),
                "pool": [] if parts.pool is None else parts.pool.steps,
            },
            self.config.checkpoint.keep,
        )
        if parts.pool is not None:
            oldest = checkpoint.all_steps(self.folder / CHECKPOINTS)
            reach = self.config.opponent.keep * self.config.opponent.every
            parts.pool.forget(min(oldest, default=0) - reach)

    def resume(self) -> int:
        """Take up the newest checkpoint, if there is one; returns the step to start with."""
        path = checkpoint.latest(self.folder / CHECKPOINTS)
        if path is None:
            return 0
        parts = self.parts
        state = checkpoint.load(path, parts.policy, parts.optimiser)
        self.config.check_same(state["settings"], str(path))
        if parts.control is not None:
            parts.control.load_state_dict(state["control"])
        parts.estimator.load_state_dict(state["estimator"])
        self.watch.load_state_dict(state["watch"])
        if parts.pool is not None:
            parts.pool.steps = [int(step) for step in state["pool"]]
        return int(state["step"])

    def _play(self, step: int) -> Played:
        config, parts = self.config, self.parts
        kind, agents, other = config.opponent.kind, dict(parts.agents), ""
        if parts.pool is not None and parts.past is not None:
            if step % config.opponent.every == 0:
                parts.pool.add(step)
            chosen = parts.pool.draw(config.seed, step)
            parts.load_past(chosen)
            other = f"step {chosen}"
            parts.past.name, parts.past.step = other, step
            agents[other] = parts.past
        elif kind == "fixed":
            other = config.opponent.agent
        return collect(
            parts.game,
            parts.players,
            agents,
            other,
            config.opponent.share,
            config.matches.matches,
            config.matches.in_flight,
            config.seed,
            step,
        )

    def _watch_clip(self, record: dict[str, Any]) -> None:
        control = self.parts.control
        if control is not None and control.actuator.name == "clip_high":
            high = control.actuator.high
            message = self.watch.observe(record["clipped_high"], control.setting, high)
            if message:
                self.messages.append(message)

    def _drop_matches(self, start: int) -> None:
        """Of a resumed run: matches of steps that will be played again."""
        path = self.folder / MATCHES
        if path.exists():
            kept = [match for match in read_records(path) if match.notes.get("step", 0) < start]
            write_records(path, kept)
