"""Saltire: low-bit inference, lossless self-speculation, entropy-scheduled RL, long-context data.

Importing it registers the quantisation method ``saltire`` with transformers, so that
``AutoModelForCausalLM.from_pretrained`` loads Saltire's checkpoints.
"""

from saltire._registration import register as _register

__version__ = "0.1.0"

_register()
