"""Quantisation: recipes, calibration, and the algorithms (BDQ, its peers' transforms, DAM)."""

from saltire.quant.quantize import quantize
from saltire.quant.recipe import Recipe
from saltire.quant.recipes import RECIPES, parse_recipe, with_effort, with_transform

__all__ = ["RECIPES", "Recipe", "parse_recipe", "quantize", "with_effort", "with_transform"]
