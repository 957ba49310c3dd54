"""The demo: a list of stages, each a small thing that shows one system at work on real input."""

from saltire.demo.entropy import ENTROPY
from saltire.demo.quantisation import QUANTISATION
from saltire.demo.selfplay import SELFPLAY
from saltire.demo.stage import Stage
from saltire.demo.synthesis import SYNTHESIS

STAGES: tuple[Stage, ...] = (QUANTISATION, ENTROPY, SELFPLAY, SYNTHESIS)

__all__ = ["STAGES", "Stage"]
