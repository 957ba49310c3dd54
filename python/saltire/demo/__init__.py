"""The demo: a list of stages, each a small thing that shows one system at work on real input."""

from saltire.demo.quantisation import QUANTISATION
from saltire.demo.stage import Stage

STAGES: tuple[Stage, ...] = (QUANTISATION,)

__all__ = ["STAGES", "Stage"]
