"""One block of a decoder on a device: two chains of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from saltire.nn.decoder import LayerWeights
from saltire.nn.device_memory import Pass
from saltire.nn.device_products import Product
from saltire.ops import layer_parts


class DeviceLayer:
    """A block's weights on the device, and its two units.

    A unit adds ``delta``, what the unit before left, to the state on its way to its norm, and
    returns what is to be added after it. trace: f32 [M, D] or None, gets the state between both.
    """

    def __init__(
        self,
        index: int,
        layer: LayerWeights,
        heads: int,
        eps: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def norm(gain: Tensor) -> Tensor:
            return gain.detach().to(device, torch.float32)

        def product(*names: str) -> Product:
            return Product({name: layer.linears[name] for name in names}, dtype, device)

        q, k, v, o, gate, up, down = layer.linears
        self.index, self.heads, self.eps, self.dtype = index, heads, eps, dtype
        self.qkv, self.o = product(q, k, v), product(o)
        self.gate_up, self.down = product(gate, up), product(down)
        self.input_norm, self.post_norm = norm(layer.input_norm), norm(layer.post_norm)
        self.q_norm = None if layer.q_norm is None else norm(layer.q_norm)
        self.k_norm = None if layer.k_norm is None else norm(layer.k_norm)
        self.window = layer.window

    @property
    def bytes(self) -> int:
        """Memory of the weights."""
        return sum(p.bytes for p in (self.qkv, self.o, self.gate_up, self.down))

    def attention(self, run: Pass, delta: Tensor | None, trace: Tensor | None) -> Tensor:
        qkv = self.qkv.of_norm(run.state, delta, self.input_norm, self.eps, trace)
        cache = (run.kv, run.scales, self.index)
        norms = (self.q_norm, self.k_norm, self.eps)
        queries, own = layer_parts.append_heads(
            qkv, run.rows, run.rotation, *norms, self.heads, *cache
        )
        seen = layer_parts.attend_heads(
            queries, own, run.rows, *cache, self.window, run.prompt, self.dtype, run.scratch
        )
        return self.o(seen)

    def mlp(self, run: Pass, delta: Tensor | None, trace: Tensor | None) -> Tensor:
        gate_up = self.gate_up.of_norm(run.state, delta, self.post_norm, self.eps, trace)
        return self.down.of_gate(gate_up)
