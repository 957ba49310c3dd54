"""What the quantisers and decoders must know of an architecture: its blocks and their linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from saltire.errors import SaltireError
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.quant_linear import QuantLinear, SharedInput

if TYPE_CHECKING:  # see hf_quantizer.py
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Part:
    """A module of a block whose output is that of one of its linears, ``end``.

    gives_weights: it returns (output, attention weights or None).
    """

    path: str
    end: str
    gives_weights: bool = False


@dataclass(frozen=True)
class Adapter:
    """One architecture: a list of blocks, each with groups of linears that read the same tensor,
    then a norm and the head.

    Groups and parts stand in the order of computation, so that a later one sees the earlier
    quantised.
    """

    model_type: str
    groups: tuple[tuple[str, ...], ...] = (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )
    blocks_path: str = "model.layers"
    norm_path: str = "model.norm"
    head_path: str = "lm_head"
    value: str = "self_attn.v_proj"
    parts: tuple[Part, ...] = (
        Part("self_attn", "self_attn.o_proj", gives_weights=True),
        Part("mlp", "mlp.down_proj"),
    )

    @property
    def output(self) -> str:
        """The linear that mixes the heads' values: the end of attention."""
        return self.parts[0].end

    def attention(self, block: nn.Module) -> Any:
        """A block's attention: it has a ``head_dim``, and a ``k_norm`` where keys are normed."""
        return block.get_submodule(self.parts[0].path)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks, in order."""
        blocks = model.get_submodule(self.blocks_path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    def linear_names(self, model: nn.Module) -> list[str]:
        """Full names of every linear that quantisation replaces."""
        return [
            f"{self.blocks_path}.{index}.{name}"
            for index in range(len(self.blocks(model)))
            for group in self.groups
            for name in group
        ]


_ADAPTERS = {name: Adapter(name) for name in ("llama", "mistral", "qwen2", "qwen3")}


def supported_architectures() -> list[str]:
    """The ``model_type`` values that Saltire can quantise."""
    return sorted(_ADAPTERS)


def adapter_for(config: PretrainedConfig) -> Adapter:
    """The adapter of a model's config; SaltireError names what is supported."""
    adapter = _ADAPTERS.get(config.model_type)
    if adapter is None:
        raise SaltireError(
            f"the architecture {config.model_type!r} is not supported. "
            f"Supported: {', '.join(supported_architectures())}."
        )
    return adapter


def share_inputs(model: PreTrainedModel) -> None:
    """Let the quantised linears of one group transform and quantise their common input once."""
    adapter = adapter_for(model.config)
    for block in adapter.blocks(model):
        for group in adapter.groups:
            modules = map(block.get_submodule, group)
            inputs = [m.down if isinstance(m, FactoredQuantLinear) else m for m in modules]
            members = [m for m in inputs if isinstance(m, QuantLinear)]
            shared = SharedInput() if _same_transform(members) else None
            for member in members:
                member.shared_input = shared


def _same_transform(members: list[QuantLinear]) -> bool:
    if len(members) < 2:
        return False

    def key(m: QuantLinear) -> tuple[object, ...]:
        f = m.format
        return f.act_bits, f.group, f.diag, f.hadamard, f.left, f.right, f.clip

    first = members[0]
    return all(
        key(m) == key(first)
        and all(
            _equal(getattr(m, name), getattr(first, name)) for name in ("diag", "left", "right")
        )
        for m in members[1:]
    )


def _equal(a: object, b: object) -> bool:
    if a is None or b is None:
        return a is b
    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return a.device.type != "meta" and torch.equal(a, b)
