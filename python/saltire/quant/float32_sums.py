"""Half-precision linears through a float32 product, where the processor has none of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

ROWS = 16  # below this torch's own dot products are faster than a converted weight


@contextmanager
def float32_sums(model: nn.Module) -> Iterator[None]:
    """Within it, plain linears in bf16 or f16 on a CPU without AVX-512 multiply in float32.

    A bf16 instruction adds up in float32 and rounds once, and so does this: y = round(x·Wᵀ + b).
    Without AVX-512 torch takes loops at a fifth of its float32 speed; a weight is converted for
    each call instead, which many rows pay for. Changes nothing elsewhere.
    """
    changed = []
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        for module in model.modules():
            if (
                type(module) is nn.Linear
                and module.weight.device.type == "cpu"
                and module.weight.dtype in (torch.bfloat16, torch.float16)
            ):
                module.forward = partial(_multiply, module)  # type: ignore[method-assign]
                changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _multiply(module: nn.Linear, x: Tensor) -> Tensor:
    if x.numel() < ROWS * x.shape[-1]:
        return nn.functional.linear(x, module.weight, module.bias)
    bias = None if module.bias is None else module.bias.float()
    return nn.functional.linear(x.float(), module.weight.float(), bias).to(x.dtype)
