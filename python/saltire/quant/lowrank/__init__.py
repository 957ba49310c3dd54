"""DAM: low-rank decomposition and quantisation together (docs/dam.md)."""

from saltire.quant.lowrank.interaction import Interaction, interaction
from saltire.quant.lowrank.truncation import Factors, Statistics, truncate

__all__ = ["Factors", "Interaction", "Statistics", "interaction", "truncate"]
