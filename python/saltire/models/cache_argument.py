"""The name under which a transformers module takes its cache; it has changed between versions."""

from __future__ import annotations

import inspect

from torch import nn


def cache_argument(module: nn.Module) -> str:
    """``cache``, or ``past_key_values`` where transformers is older than that name."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
