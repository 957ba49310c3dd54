"""Self-play: language models as agents of games, and training on how their matches end."""

from saltire.rl.selfplay.agents import ModelAgent, Voice, open_agents, open_model
from saltire.rl.selfplay.decoder_writer import DecoderWriter
from saltire.rl.selfplay.writers import Draft, RolloutWriter, Writer

__all__ = [
    "DecoderWriter",
    "Draft",
    "ModelAgent",
    "RolloutWriter",
    "Voice",
    "Writer",
    "open_agents",
    "open_model",
]
