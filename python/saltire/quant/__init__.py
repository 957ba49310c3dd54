"""Quantisation: recipes, calibration, and the algorithms (BDQ now; DAM to come)."""

from saltire.quant.quantize import quantize
from saltire.quant.recipe import RECIPES, Recipe, parse_recipe

__all__ = ["RECIPES", "Recipe", "parse_recipe", "quantize"]
