"""The self-play trainer: matches, advantages from their outcomes, control of entropy, updates.

One step: play the matches; score what the learner wrote (the old log-probs, and the entropy over
all ranks); turn outcomes into advantages; let the controller move its actuator; update. Advantages
are those of the estimator: nothing here centres, whitens or drops them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.files import replacing_file
from saltire.games import Agent, Fixture, Game, MatchRecord, play
from saltire.games.records import line, read_records, write_records
from saltire.progress import track
from saltire.rl import checkpoint
from saltire.rl.actuators import Knobs
from saltire.rl.authority import ClipWatch
from saltire.rl.control import EntropyControl, EntropyMeter, Reading
from saltire.rl.dept import match_entropy
from saltire.rl.distributed import all_sum, barrier, gather, part_of, rank
from saltire.rl.match_outcome import AdvantageEstimator
from saltire.rl.plant import measure_authority
from saltire.rl.policy import Policy
from saltire.rl.prompts import EVALUATION_STEP
from saltire.rl.runlog import LOG, RunLog
from saltire.rl.selfplay.agents import ModelAgent
from saltire.rl.selfplay.collect import LEARNER, Played, collect, deal
from saltire.rl.selfplay.config import SelfPlayConfig, is_due, learning_rate
from saltire.rl.selfplay.pool import Pool
from saltire.rl.step import Experience, UpdateConfig, UpdateStats, score, update

CHECKPOINTS, SETTINGS, MATCHES = "checkpoints", "settings.json", "matches.jsonl"


@dataclass
class SelfPlayParts:
    """What the trainer works on; :func:`saltire.rl.selfplay.setup.make_parts` makes it.

    agents: the learner, and who else sits at the table. refresh: gives the learner's writer the
    policy's present weights. past: the model that a past self's weights are loaded into.
    """

    game: Game[Any, Any]
    players: int
    policy: Policy
    optimiser: torch.optim.Optimizer
    learner: ModelAgent
    agents: dict[str, Agent]
    estimator: AdvantageEstimator
    refresh: Callable[[], None]
    control: EntropyControl | None = None
    pool: Pool | None = None
    past: ModelAgent | None = None
    load_past: Callable[[int], None] = lambda step: None
    measured_against: Agent | None = None


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
        sequences = played.sequences(parts.learner.codec.pad).to(self.device)
        old, entropy = self.measure(sequences, temperature)
        judged_at = time.perf_counter()
        advantages = parts.estimator.advantages(played.outcomes())
        judging = time.perf_counter() - judged_at
        by_turn = torch.tensor(played.by_turn(advantages), device=self.device)
        experience = Experience(sequences, by_turn, old)
        places = torch.tensor([turn.match for turn in played.turns], device=self.device)
        knobs, reading = self.knobs(temperature), None
        if parts.control is not None:
            if step == 0 and config.entropy.probe:
                self.probe(experience, places, temperature)
            reading = parts.control.observe(step, entropy)
            knobs = replace(parts.control.knobs(knobs), temperature=temperature)
        stats = self.learn(experience, places, knobs, step)
        record = {"step": step, "entropy": entropy, **self._control_record(reading)}
        record |= self._match_record(played)
        record |= self._update_record(stats, by_turn)
        record |= parts.estimator.report()
        self._watch_clip(record)
        if config.evaluation.every and is_due(step, config.evaluation.every, config.steps):
            record["win_rate"] = self.evaluate(step)
        record["play_seconds"] = played_at - began
        record["advantage_seconds"] = judging
        record["seconds"] = time.perf_counter() - began
        matches = [
            replace(match, notes={"step": step})
            for match in gather(played.records + played.crashed)
        ]
        return record, matches

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.parts.policy.parameters()).device

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

    def measure(self, sequences: Any, temperature: float) -> tuple[Tensor, float]:
        """The present policy's log-probs, f32 [B, S], and its mean entropy over all ranks."""
        update = self.config.update
        logprob, entropy = score(
            self.parts.policy, sequences, temperature, update.micro_batch, update.bf16
        )
        meter = EntropyMeter()
        meter.add(entropy, sequences.action)
        return logprob, meter.mean()

    def learn(
        self, experience: Experience, places: Tensor, knobs: Knobs, step: int
    ) -> list[UpdateStats]:
        """All updates on one step's matches; a mini-batch holds every ``minibatches``-th match.

        places: int64 [B], the match of each sequence.
        """
        config, parts = self.config.update, self.parts
        for group in parts.optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        how = UpdateConfig(
            config.algorithm,
            config.micro_batch,
            config.max_grad_norm,
            0.0,
            self.config.matches.max_new_tokens,
            config.bf16,
        )
        rows = [
            (places % config.minibatches == part).nonzero().flatten()
            for part in range(config.minibatches)
        ]
        counts = all_sum([len(some) for some in rows])
        first = torch.zeros(1, dtype=torch.int64, device=places.device)
        return [
            update(
                parts.policy,
                parts.optimiser,
                experience.rows(some if len(some) else first),
                knobs,
                how,
                counted=len(some) > 0,
            )
            for _ in range(config.epochs)
            for some, count in zip(rows, counts, strict=True)
            if count
        ]

    def probe(self, experience: Experience, places: Tensor, temperature: float) -> None:
        """Measure the actuator's authority on these matches; everything is left as it was."""
        control = self.parts.control
        assert control is not None
        knobs = self.knobs(temperature)

        def learn(setting: float) -> None:
            self.learn(experience, places, control.actuator.apply(knobs, setting), 0)

        authority = measure_authority(
            self.parts.policy,
            self.parts.optimiser,
            control,
            self.config.update.updates_per_rollout,
            learn,
            lambda: self.measure(experience.sequences, temperature)[1],
        )
        if authority is not None and authority.advice:
            self.messages.append(authority.advice)

    def evaluate(self, step: int) -> float:
        """Win rate of the present policy against ``evaluation.agent``, a draw being half a win."""
        config, parts = self.config.evaluation, self.parts
        assert parts.measured_against is not None
        parts.refresh()
        parts.learner.step, parts.learner.keep = EVALUATION_STEP, False
        agents: dict[str, Agent] = {LEARNER: parts.learner, "other": parts.measured_against}
        fixtures = []
        for n in part_of(range(config.matches)):
            seats = tuple(
                LEARNER if p == n % parts.players else "other" for p in range(parts.players)
            )
            fixtures.append(Fixture(n, deal(self.config.seed, EVALUATION_STEP, n), seats))
        won = []
        for record in play(parts.game, agents, fixtures, self.config.matches.in_flight):
            if not record.error:
                rewards = dict(zip(record.agents, record.rewards, strict=True))
                difference = rewards[LEARNER] - rewards["other"]
                won.append(1.0 if difference > 0 else 0.5 if difference == 0 else 0.0)
        parts.learner.keep = True
        total, count = all_sum([sum(won), len(won)])
        return total / count if count else 0.0

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

    def _match_record(self, played: Played) -> dict[str, float]:
        """Of all ranks: rewards, lengths, forfeits, and how matches ended."""
        outcomes = self.parts.game.outcomes
        ends = Counter(record.outcome for record in played.records)
        rewards = [r for outcome in played.outcomes() for r in outcome.rewards]
        sums = all_sum(
            [
                len(played.records),
                len(played.crashed),
                sum(bool(record.forfeits) for record in played.records),
                sum(len(record.turns) for record in played.records),
                sum(rewards),
                len(rewards),
                len(played.turns),
                sum(len(turn.completion) for turn in played.turns),
                *(ends[outcome] for outcome in outcomes),
            ]
        )
        matches, crashed, forfeits, replies, reward, seats, turns, tokens, *counts = sums
        record = {
            "reward": reward / seats,
            "matches": matches,
            "crashed": crashed,
            "forfeits": forfeits / matches,
            "replies": replies / matches,
            "length": tokens / turns if turns else 0.0,
            "match_entropy": match_entropy(counts),
        }
        shares = zip(outcomes, counts, strict=True)
        return record | {f"share {label}": count / matches for label, count in shares}

    def _update_record(self, stats: list[UpdateStats], advantages: Tensor) -> dict[str, float]:
        total, size, count = all_sum(
            [float(advantages.sum()), float(advantages.abs().sum()), advantages.numel()]
        )
        record = {"advantage": total / count, "advantage_size": size / count}
        for name in ("loss", "clipped_high", "clipped_low", "grad_norm"):
            record[name] = sum(getattr(s, name) for s in stats) / len(stats)
        return record

    def _control_record(self, reading: Reading | None) -> dict[str, Any]:
        if reading is None:
            return {}
        return {
            "target": reading.target,
            "error": reading.error,
            "actuator": reading.setting,
            "saturated": reading.saturated,
            "phase": reading.phase,
        }

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
