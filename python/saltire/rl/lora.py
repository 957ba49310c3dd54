"""LoRA, as little of it as training needs; adapters are saved in the format of the package peft.

    y = W·x + (alpha / rank)·B·(A·x),   A ~ Kaiming-uniform, B = 0

Source: Hu et al., LoRA (2021). An own class rather than peft's: sixty lines, no wrapper around the
model, and parameter names that stay those of the model.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.files import replacing_directory
from saltire.rl.config import LoraConfig


class LoraLinear(nn.Linear):
    """A linear layer that keeps its frozen weight and adds a low-rank term."""

    def __init__(self, base: nn.Linear, config: LoraConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = config.alpha / config.rank
        self.active = True
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """See the module's formula."""
        y = nn.functional.linear(x, self.weight, self.bias)
        if not self.active:
            return y
        low = nn.functional.linear(x.to(self.lora_A.dtype), self.lora_A)
        return y + (self.scale * nn.functional.linear(low, self.lora_B)).to(y.dtype)


def add_lora(model: nn.Module, config: LoraConfig, seed: int) -> int:
    """Freeze the model and put adapters on every linear that ``config.targets`` names.

    Returns the number of adapters. Raises SaltireError if there is none.
    """
    model.requires_grad_(False)
    torch.manual_seed(seed)
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in config.targets and type(child) is nn.Linear
    ]
    if not found:
        raise SaltireError(
            f"lora.targets {', '.join(config.targets)}: the model has no such linear layer."
        )
    for parent, name, child in found:
        setattr(parent, name, LoraLinear(child, config))
    return len(found)


@contextlib.contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Within, the adapters are silent: the model is the one that training started from."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def save_adapter(
    tensors: Mapping[str, Tensor], config: LoraConfig, base: str, out: str | Path
) -> None:
    """Write adapters as peft reads them: ``adapter_model.safetensors`` and ``adapter_config.json``.

    tensors: the trained parameters by their names in the model, ``….q_proj.lora_A``.
    """
    with replacing_directory(out) as directory:
        save_file(
            {f"base_model.model.{name}.weight": t.contiguous() for name, t in tensors.items()},
            directory / "adapter_model.safetensors",
        )
        (directory / "adapter_config.json").write_text(
            json.dumps(
                {
                    "peft_type": "LORA",
                    "task_type": "CAUSAL_LM",
                    "base_model_name_or_path": base,
                    "r": config.rank,
                    "lora_alpha": config.alpha,
                    "lora_dropout": 0.0,
                    "bias": "none",
                    "target_modules": list(config.targets),
                },
                indent=2,
            )
        )
