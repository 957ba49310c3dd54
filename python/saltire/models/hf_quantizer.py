"""Saltire as a quantisation method of transformers: importing this module registers it.

With it ``AutoModelForCausalLM.from_pretrained`` reads Saltire's checkpoints, and
``model.save_pretrained`` writes packed integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for, share_inputs
from saltire.models.kv_rounding import UNROUNDED, check_kv_bits, set_kv_bits
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.linear_format import AnyFormat, FactoredFormat, read_format
from saltire.nn.quant_embedding import EmbeddingFormat, QuantEmbedding
from saltire.nn.quant_linear import QuantLinear

if TYPE_CHECKING:  # this module may be imported while transformers itself is being imported
    from transformers import PreTrainedModel

METHOD = "saltire"
FORMAT_VERSION = 2  # 2: the embedding may be quantised


@register_quantization_config(METHOD)
class SaltireConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a checkpoint: which layers are quantised, and how.

    layers: full module name -> fields of its format. recipe: the name it was
    made with, for people. rest_dtype: dtype in which the tensors that are not quantised are stored.
    kv_bits: of keys and values, 16 for as they come.
    """

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        recipe: str = "",
        rest_dtype: str = "bfloat16",
        kv_bits: int = UNROUNDED,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
    ) -> None:
        if format_version > FORMAT_VERSION:
            raise SaltireError(
                f"the checkpoint has format version {format_version}; this saltire reads up to "
                f"{FORMAT_VERSION}. Upgrade saltire."
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.recipe = recipe
        self.rest_dtype = rest_dtype
        check_kv_bits(kv_bits)
        self.kv_bits = kv_bits
        self.layers = {name: dict(values) for name, values in (layers or {}).items()}

    def formats(self) -> dict[str, AnyFormat]:
        """Full module name -> its format."""
        return {name: read_format(values) for name, values in self.layers.items()}


@register_quantizer(METHOD)
class SaltireHfQuantizer(HfQuantizer):
    """Builds the quantised skeleton that a checkpoint is loaded into, and saves it again."""

    requires_calibration = True
    quantization_config: SaltireConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        adapter_for(model.config)
        for name, format in self.quantization_config.formats().items():
            replace_layer(model, name, format)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        share_inputs(model)
        set_kv_bits(model, self.quantization_config.kv_bits)
        return model

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors to save: packed codes as they are, everything else in ``rest_dtype``."""
        rest = getattr(torch, self.quantization_config.rest_dtype)
        ours = tuple(f"{name}." for name in self.quantization_config.layers)
        cast: dict[tuple[int, int], Tensor] = {}  # a tied tensor stays one tensor, stored once
        state = model.state_dict()
        for name, tensor in state.items():
            if tensor.is_floating_point() and not name.startswith(ours):
                key = tensor.data_ptr(), tensor.numel()
                state[name] = cast.setdefault(key, tensor.to(rest))
        return state, {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def replace_layer(model: torch.nn.Module, name: str, format: AnyFormat) -> torch.nn.Module:
    """Put an empty quantised layer in place of the one called ``name``, on the same device."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    new = _empty_layer(name, parent.get_submodule(child), format)
    setattr(parent, child, new)
    return new


def _empty_layer(name: str, old: torch.nn.Module, format: AnyFormat) -> torch.nn.Module:
    if isinstance(format, EmbeddingFormat):
        if not isinstance(old, torch.nn.Embedding):
            raise SaltireError(f"{name} is a {type(old).__name__}; expected an embedding.")
        V, D = old.num_embeddings, old.embedding_dim
        with torch.device(old.weight.device):
            return QuantEmbedding(V, D, format, old.weight.dtype)
    linear = old
    if not isinstance(linear, torch.nn.Linear):
        raise SaltireError(f"{name} is a {type(linear).__name__}; expected a linear layer.")
    K, N, bias = linear.in_features, linear.out_features, linear.bias is not None
    with torch.device(linear.weight.device):
        if isinstance(format, FactoredFormat):
            return FactoredQuantLinear(K, N, format, bias=bias)
        return QuantLinear(K, N, format, bias=bias)
