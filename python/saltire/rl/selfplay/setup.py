"""From settings to a self-play trainer's parts: game, model, agents, estimator, control."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from saltire.errors import SaltireError
from saltire.games import Agent, Game, make
from saltire.models.decoder import build_decoder
from saltire.models.loading import load_model
from saltire.rl.checkpoint import trained
from saltire.rl.dept import Dept
from saltire.rl.distributed import default_device, world_size
from saltire.rl.match_outcome import AdvantageEstimator
from saltire.rl.prompts import Codec
from saltire.rl.role_baselines import NoBaseline, RoleAverage, RoleGroup
from saltire.rl.rollout import TransformersRollout
from saltire.rl.selfplay.agents import ModelAgent, open_agents
from saltire.rl.selfplay.collect import LEARNER
from saltire.rl.selfplay.config import AdvantagesConfig, SelfPlayConfig
from saltire.rl.selfplay.decoder_writer import DecoderWriter
from saltire.rl.selfplay.parts import SelfPlayParts
from saltire.rl.selfplay.pool import Pool
from saltire.rl.selfplay.trainable import control_of, make_trainable
from saltire.rl.selfplay.trainer import SelfPlayTrainer
from saltire.rl.selfplay.writers import RolloutWriter, Writer

POOL = "past"


def make_selfplay(
    config: SelfPlayConfig, model: PreTrainedModel | None = None, tokenizer: Any = None
) -> SelfPlayTrainer:
    """A trainer by the settings; a model in hand (with its tokenizer) saves loading it."""
    game = make(config.game, **config.options)
    make_estimator(config.advantages, game)  # what it refuses, it refuses before a model is loaded
    if model is None or tokenizer is None:
        model, tokenizer = load_model(config.model)
    return SelfPlayTrainer(config, make_parts(config, game, model, tokenizer))


def make_estimator(config: AdvantagesConfig, game: Game[Any, Any]) -> AdvantageEstimator:
    """What turns the game's outcomes into advantages. Raises SaltireError for one outcome only."""
    if len(set(game.outcomes)) < 2:
        raise SaltireError(
            f"{game.name} can end in {len(set(game.outcomes))} way; self-play learns from how "
            "matches end, so a game needs at least two outcomes."
        )
    if config.kind == "dept":
        return Dept({game.name: game.outcomes}, {game.name: game.roles}, config.dept())
    if config.kind == "rae":
        return RoleAverage({game.name: game.roles}, config.decay)
    return RoleGroup() if config.kind == "grpo" else NoBaseline()


def make_parts(
    config: SelfPlayConfig, game: Game[Any, Any], model: PreTrainedModel, tokenizer: Any
) -> SelfPlayParts:
    """Join the model to the game, its opponents, its optimiser and its control."""
    made = make_trainable(model, config.update, config.lora, config.seed)
    voice = config.matches.voice(config.seed)
    codec = Codec(tokenizer, voice.instruction)
    writer, restart = _writer(config, made.sampled, codec)
    learner = ModelAgent(LEARNER, codec, writer, voice, keep=True)

    def refresh() -> None:
        made.refresh()
        restart()

    parts = SelfPlayParts(
        game,
        game.check_players(config.players or None),
        made.policy,
        made.optimiser,
        learner,
        {LEARNER: learner},
        make_estimator(config.advantages, game),
        refresh,
        control_of(config.entropy, config.steps, made.policy.max_entropy),
    )
    if config.opponent.kind == "fixed":
        parts.agents |= open_agents([config.opponent.agent], voice)
    if config.opponent.kind == "past":
        twin = copy.deepcopy(made.sampled).requires_grad_(False)
        names = [name for name, _ in trained(model)]
        pool = Pool(Path(config.output) / POOL, made.sampled, names, config.opponent.keep)
        twin_writer, twin_restart = _writer(config, twin, codec)
        parts.pool, parts.past = pool, ModelAgent("past", codec, twin_writer, voice)

        def load_past(step: int) -> None:
            pool.load(step, twin)
            twin_restart()

        parts.load_past = load_past
    if config.evaluation.every:
        agent: Agent = open_agents([config.evaluation.agent], voice)[config.evaluation.agent]
        parts.measured_against = agent
    return parts


def _writer(
    config: SelfPlayConfig, model: PreTrainedModel, codec: Codec
) -> tuple[Writer, Callable[[], None]]:
    """What the learner writes with, and what to call when its weights have changed.

    The decoder reads the very tensors that training changes. It knows no adapters, and a group of
    ranks samples from copies; there, and on CUDA, transformers writes.
    """
    engine = config.matches.engine
    plain = config.lora is None and default_device().type == "cpu" and world_size() == 1
    if engine == "decoder" and not plain:
        raise SaltireError(
            "matches.engine is decoder, which writes for full training on one CPU process only; "
            "use auto or transformers."
        )
    if engine != "transformers" and plain:
        try:
            writer = DecoderWriter(
                build_decoder(model), codec.stop, 2 * min(config.matches.in_flight, 64)
            )
            return writer, writer.restart
        except SaltireError:
            if engine == "decoder":
                raise
    positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2048))
    rollout = TransformersRollout(model, codec.stop, codec.pad)
    return RolloutWriter(rollout, positions), lambda: None
