"""Entropy Scheduling (ES) and self-play: RL training in which entropy follows a schedule."""

from saltire.rl.actuators import ACTUATORS, Actuator, Knobs, actuator
from saltire.rl.authority import Authority, ClipWatch, probe
from saltire.rl.control import EntropyControl, EntropyMeter, Reading
from saltire.rl.controllers import PID, ControllerState, OpenLoop, SignRule
from saltire.rl.curriculum import Curriculum, CurriculumConfig
from saltire.rl.passk import mean_pass_at_k, pass_at_k
from saltire.rl.schedules import (
    Constant,
    Cyclic,
    Piecewise,
    PlateauAnneal,
    Ramp,
    Schedule,
    StableThenAnneal,
    phase_of,
    schedule_for_goal,
)

__all__ = [
    "ACTUATORS",
    "PID",
    "Actuator",
    "Authority",
    "ClipWatch",
    "Constant",
    "ControllerState",
    "Curriculum",
    "CurriculumConfig",
    "Cyclic",
    "EntropyControl",
    "EntropyMeter",
    "Knobs",
    "OpenLoop",
    "Piecewise",
    "PlateauAnneal",
    "Ramp",
    "Reading",
    "Schedule",
    "SignRule",
    "StableThenAnneal",
    "actuator",
    "mean_pass_at_k",
    "pass_at_k",
    "phase_of",
    "probe",
    "schedule_for_goal",
]
