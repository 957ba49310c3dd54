"""Decoders with random weights, made on the device layer by layer: nothing of them ever lies on the
host, and of a large one no two layers exist twice at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saltire.nn.decoder import DecoderSizes, LayerWeights
from saltire.nn.device_decoder import DeviceDecoder
from saltire.nn.linear_format import LinearFormat
from saltire.nn.quant_linear import QuantLinear

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """What a model's time depends on. theta: of its rotation."""

    sizes: DecoderSizes
    layers: int
    theta: float
    tied: bool


LLAMA_3_8B = Shape(DecoderSizes(4096, 14336, 32, 8, 128, 128256, 8192), 32, 5e5, False)
SMOLLM2_135M = Shape(DecoderSizes(576, 1536, 9, 3, 64, 49152, 8192), 30, 1e5, True)


def random_decoder(
    shape: Shape,
    format: LinearFormat | None,
    head_format: LinearFormat | None = None,
    device: str = "cuda",
) -> DeviceDecoder:
    """A decoder of that shape; formats None: bfloat16."""
    sizes, D = shape.sizes, shape.sizes.hidden
    with torch.device(device):
        embedding = torch.randn(sizes.vocabulary, D, dtype=BF16)
        if head_format is not None:
            head: nn.Module = random_linear(D, sizes.vocabulary, head_format)
        else:
            head = nn.Linear(D, sizes.vocabulary, bias=False, device="meta")
            weight = embedding if shape.tied else torch.randn_like(embedding) / D**0.5
            head.weight = nn.Parameter(weight, requires_grad=False)
        final_norm = torch.ones(D)

    def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
        half = sizes.head_dim // 2
        frequencies = shape.theta ** (-torch.arange(half, device=positions.device) / half)
        angles = positions[:, None].float() * frequencies
        return angles.cos(), angles.sin()

    return DeviceDecoder(
        sizes, 1e-5, embedding, head, final_norm, _layers(shape, format, device), rotation
    )


def random_linear(K: int, N: int, format: LinearFormat | None) -> nn.Module:
    """A linear layer whose outputs are about as large as its inputs, on the default device."""
    if format is None:
        linear = nn.Linear(K, N, bias=False, dtype=BF16)
        nn.init.normal_(linear.weight, std=K**-0.5)
        return linear.requires_grad_(False)
    module = QuantLinear(K, N, format)
    module.weight_packed.random_(0, 256)
    # Codes about their middle have a deviation of 4.6 (4 bits) or 1.1 (2 bits).
    module.weight_scale.fill_(K**-0.5 / (4.6 if format.weight_bits == 4 else 1.1))
    return module


def _layers(shape: Shape, format: LinearFormat | None, device: str) -> Iterator[LayerWeights]:
    s = shape.sizes
    D, q, kv = s.hidden, s.heads * s.head_dim, s.kv_heads * s.head_dim
    shapes = {"q": (D, q), "k": (D, kv), "v": (D, kv), "o": (q, D), "gate": (D, s.ffn),
              "up": (D, s.ffn), "down": (s.ffn, D)}  # fmt: skip
    for _ in range(shape.layers):
        with torch.device(device):
            norms = torch.ones(D), torch.ones(D)
            linears = {name: random_linear(*size, format) for name, size in shapes.items()}
        yield LayerWeights(*norms, None, None, linears)
