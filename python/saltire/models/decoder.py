"""A native decoder from a transformers model; the weights are shared, not copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for
from saltire.models.kv_rounding import kv_bits
from saltire.nn.decoder import Decoder, DecoderSizes, LayerWeights
from saltire.nn.device_decoder import DeviceDecoder
from saltire.nn.kv_cache import CODE_BITS
from saltire.nn.native_decoder import NativeDecoder
from saltire.nn.quant_embedding import QuantEmbedding
from saltire.ops.decoder_layer import HEAD_DIM_MULTIPLE, MAX_HEAD_DIM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CACHE_DTYPES = {16: torch.float32, **{bits: dtype for dtype, bits in CODE_BITS.items()}}
# Rotations whose frequencies do not change with the length of the text.
STATIC_ROTATIONS = ("default", "linear", "llama3", "yarn")


def _as_it_is(name: str, module: nn.Module) -> nn.Module:
    return module


def build_decoder(
    model: PreTrainedModel, linear: Callable[[str, nn.Module], nn.Module] = _as_it_is
) -> Decoder:
    """A ``Decoder`` on the weights of a Llama, Mistral, Qwen2 or Qwen3 model.

    linear: what stands for a named linear layer; by default itself.

    On the CPU, training the model afterwards changes the decoder too; moving or casting it does
    not. On a CUDA device the decoder has copies of its own, dense ones in bfloat16. Raises
    SaltireError, naming what it is, for anything in the model that the decoder cannot run.
    """
    weights, dtype = _weights(model, linear), CACHE_DTYPES[kv_bits(model)]
    if model.device.type == "cuda":
        return DeviceDecoder(*weights, torch.bfloat16 if dtype == torch.float32 else dtype)
    return NativeDecoder(*weights, dtype)


def build_device_decoder(
    model: PreTrainedModel,
    linear: Callable[[str, nn.Module], nn.Module] = _as_it_is,
    cache_dtype: torch.dtype = torch.bfloat16,
    dtype: torch.dtype = torch.bfloat16,
) -> DeviceDecoder:
    """What ``build_decoder`` makes on a CUDA device, with dtypes to choose; on the CPU too, where
    it is slow: its parts then are their specification."""
    return DeviceDecoder(*_weights(model, linear), cache_dtype, dtype)


Weights = tuple[
    DecoderSizes,
    float,
    Tensor | QuantEmbedding,
    nn.Module,
    Tensor,
    Iterable[LayerWeights],
    Callable[[Tensor], tuple[Tensor, Tensor]],
]


def _weights(model: PreTrainedModel, linear: Callable[[str, nn.Module], nn.Module]) -> Weights:
    """What both kinds of decoders are made of; layers come one after another."""
    config = model.config
    adapter = adapter_for(config)
    _check_config(config)
    body = model.get_submodule(adapter.blocks_path.rsplit(".", 1)[0])
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if getattr(head, "bias", None) is not None:
        raise SaltireError("the output head has a bias, which the decoder cannot run.")
    sizes = DecoderSizes(
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=_head_dim(config),
        vocabulary=embedding.num_embeddings,
        positions=config.max_position_embeddings,
    )
    layers = (
        _layer(block, adapter.groups, _window(config, index), linear)
        for index, block in enumerate(adapter.blocks(model))
    )
    rotary: Any = body.get_submodule("rotary_emb")

    def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, None].float() * rotary.inv_freq[None, :].float()
        return angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling

    norm: Any = body.get_submodule("norm")
    return (
        sizes,
        config.rms_norm_eps,
        embedding if isinstance(embedding, QuantEmbedding) else embedding.weight,
        linear("lm_head", head),
        norm.weight,
        layers,
        rotation,
    )


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _check_config(config: Any) -> None:
    head_dim = _head_dim(config)
    if head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
        raise SaltireError(
            f"head_dim = {head_dim}; the decoder runs multiples of {HEAD_DIM_MULTIPLE} up to "
            f"{MAX_HEAD_DIM}."
        )
    if config.hidden_act != "silu":
        raise SaltireError(f"hidden_act = {config.hidden_act!r}; the decoder runs 'silu'.")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in STATIC_ROTATIONS:
        raise SaltireError(f"rope_type = {kind!r}; the decoder runs {', '.join(STATIC_ROTATIONS)}.")
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise SaltireError(f"partial_rotary_factor = {partial}; the decoder rotates whole heads.")


def _window(config: Any, index: int) -> int:
    """Slots that layer ``index`` looks back, itself included; 0 for all."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    if kinds is not None:
        return window if kinds[index] == "sliding_attention" else 0
    return window


def _layer(
    block: nn.Module,
    groups: tuple[tuple[str, ...], ...],
    window: int,
    linear: Callable[[str, nn.Module], nn.Module],
) -> LayerWeights:
    attention = block.get_submodule("self_attn")

    def norm(parent: nn.Module, name: str) -> Tensor | None:
        module = getattr(parent, name, None)
        return None if module is None else module.weight

    names = [name for group in groups for name in group]
    input_norm, post_norm = norm(block, "input_layernorm"), norm(block, "post_attention_layernorm")
    assert input_norm is not None
    assert post_norm is not None
    return LayerWeights(
        input_norm=input_norm,
        post_norm=post_norm,
        q_norm=norm(attention, "q_norm"),
        k_norm=norm(attention, "k_norm"),
        linears={name: linear(name, block.get_submodule(name)) for name in names},
        window=window,
    )
