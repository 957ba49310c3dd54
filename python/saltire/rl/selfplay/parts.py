"""What a self-play trainer works on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from saltire.games import Agent, Game
from saltire.rl.control import EntropyControl
from saltire.rl.match_outcome import AdvantageEstimator
from saltire.rl.policy import Policy
from saltire.rl.selfplay.agents import ModelAgent
from saltire.rl.selfplay.pool import Pool


@dataclass
class SelfPlayParts:
    """Made by :func:`saltire.rl.selfplay.setup.make_parts`.

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

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device
