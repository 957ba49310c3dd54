"""What is done to an input and, inversely, to the weights it meets, before both are rounded."""

from saltire.quant.transforms.closed_form import input_diagonal, rotation
from saltire.quant.transforms.start import starting_transform
from saltire.quant.transforms.transform import Transform

__all__ = ["Transform", "input_diagonal", "rotation", "starting_transform"]
