"""Language models as agents, and agents by the names that the command line uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from saltire.errors import SaltireError
from saltire.games.agents import SCRIPTED, Agent, Ask, Reply, ScriptedAgent, scripted, unknown_agent
from saltire.games.reply import THINK_THEN_ACT
from saltire.models.decoder import build_decoder
from saltire.models.loading import load_model
from saltire.rl.prompts import Codec
from saltire.rl.rollout import TransformersRollout, uniform_numbers
from saltire.rl.selfplay.decoder_writer import DecoderWriter
from saltire.rl.selfplay.writers import Draft, Key, RolloutWriter, Writer

ACT_AT_ONCE = "Reply with your move alone."

Engine = Literal["auto", "decoder", "transformers"]


@dataclass(frozen=True)
class Voice:
    """How a model is asked and sampled.

    think: ask for a thought before the move; a model that cannot keep to that form forfeits often
    and does better without.
    """

    max_new_tokens: int = 160
    temperature: float = 0.8
    think: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise SaltireError(f"max_new_tokens = {self.max_new_tokens}; expected at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise SaltireError(f"temperature = {self.temperature}; expected 0 (greedy) or more.")

    @property
    def instruction(self) -> str:
        return THINK_THEN_ACT if self.think else ACT_AT_ONCE


@dataclass(frozen=True)
class Turn:
    """What a model was given and what it wrote, in tokens."""

    match: int
    player: int
    turn: int
    prompt: list[int]
    completion: list[int]


class ModelAgent(Agent):
    """Writes every answer with a language model.

    The numbers that decide a reply are a function of (voice.seed, match, player, turn, attempt).
    keep: remember every turn in ``taken``, for training.
    """

    def __init__(
        self, name: str, codec: Codec, writer: Writer, voice: Voice, keep: bool = False
    ) -> None:
        self.name, self.codec, self.writer, self.voice, self.keep = (
            name,
            codec,
            writer,
            voice,
            keep,
        )
        self.taken: list[Turn] = []
        self.step = 0
        self._asked: dict[Key, tuple[Ask, list[int]]] = {}

    def ask(self, ask: Ask) -> None:
        refused = f"\nYour last reply was refused: {ask.refused}.\n" if ask.refused else ""
        prompt = self.codec.encode(ask.observation + refused)
        voice = self.voice
        if len(prompt) + voice.max_new_tokens > self.writer.positions:
            raise SaltireError(
                f"a prompt of {len(prompt)} tokens and {voice.max_new_tokens} new ones do not fit "
                f"the {self.writer.positions} positions of the model {self.name}."
            )
        number = (ask.match * 64 + ask.player) * 4096 + ask.turn
        uniforms = uniform_numbers(voice.seed, self.step, [number], voice.max_new_tokens)[0]
        key = (ask.match, ask.player)
        self._asked[key] = (ask, prompt)
        self.writer.submit(Draft(key, prompt, uniforms, voice.temperature))

    @property
    def busy(self) -> bool:
        return bool(self._asked)

    def advance(self) -> list[Reply]:
        replies = []
        for key, completion in self.writer.advance():
            ask, prompt = self._asked.pop(key)
            if self.keep:
                self.taken.append(Turn(ask.match, ask.player, ask.turn, prompt, completion))
            text = self.codec.decode(completion)
            if not completion or completion[-1] not in self.codec.stop:
                text = cut_off(text, self.voice.think)
            replies.append(Reply(ask, text))
        return replies

    def over(self, match: int) -> None:
        for key in [key for key in self._asked if key[0] == match]:
            del self._asked[key]
        self.writer.forget(match)


def cut_off(text: str, think: bool) -> str:
    """A reply that the limit of tokens ended: where a thought was asked for, it counts as one that
    was never closed, unless the move had begun."""
    return f"<think>{text}" if think and "</think>" not in text and "<think>" not in text else text


class Human(ScriptedAgent):
    """A person at a terminal. show: prints what the player may know; read: returns a line."""

    def __init__(self, show: Callable[[Ask], None], read: Callable[[], str]) -> None:
        def reply(ask: Ask) -> str:
            show(ask)
            return read()

        super().__init__("human", reply, retries=5)


def open_model(spec: str, voice: Voice, engine: Engine = "auto", sequences: int = 64) -> ModelAgent:
    """A model agent: on the native decoder where it can run the model, else on transformers.

    The decoder reads bf16 weights and keeps a bf16 cache. Raises SaltireError for a model that
    cannot be loaded, or that the engine asked for cannot run.
    """
    model, tokenizer = load_model(spec, torch.bfloat16 if engine != "transformers" else None)
    codec = Codec(tokenizer, voice.instruction)
    writer: Writer
    if engine != "transformers":
        try:
            writer = DecoderWriter(build_decoder(model), codec.stop, sequences, torch.bfloat16)
            return ModelAgent(spec, codec, writer, voice)
        except SaltireError:
            if engine == "decoder":
                raise
            model, tokenizer = load_model(spec)
    positions = int(getattr(model.config.get_text_config(), "max_position_embeddings", 2048))
    rollout = TransformersRollout(model, codec.stop, codec.pad)
    return ModelAgent(spec, codec, RolloutWriter(rollout, positions), voice)


def open_agents(
    names: list[str],
    voice: Voice,
    human: Callable[[], Agent] | None = None,
    engine: Engine = "auto",
    sequences: int = 64,
) -> dict[str, Agent]:
    """Each different name's agent; the same name twice is one agent that plays both seats.

    Raises SaltireError with the nearest names for one that is no script and no model.
    """
    agents: dict[str, Agent] = {}
    for name in names:
        if name in agents:
            continue
        if name in SCRIPTED:
            agents[name] = scripted(name)
        elif name == "human":
            if human is None:
                raise SaltireError("human plays in saltire play, at a terminal, and nowhere else.")
            agents[name] = human()
        elif looks_like_model(name):
            agents[name] = open_model(name, voice, engine, sequences)
        else:
            raise SaltireError(unknown_agent(name))
    return agents


def looks_like_model(name: str) -> bool:
    """``default``, a path, a .gguf file, or a hub name (owner/name)."""
    return name == "default" or "/" in name or name.endswith(".gguf") or Path(name).exists()
