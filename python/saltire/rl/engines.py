"""What samples the rollouts, and how it comes by the policy's present weights.

Where weights can be shared they are: in a world of one our decoder and transformers both read the
tensors that the optimiser writes. Two cases need a copy, refreshed before every rollout: ranks, who
cannot share a sharded model while they generate for different lengths of time; and LoRA under our
decoder, which runs merged weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder
from saltire.rl.checkpoint import trained, whole
from saltire.rl.config import LoraConfig, RolloutConfig
from saltire.rl.decoder_rollout import DecoderRollout, merge_lora
from saltire.rl.distributed import world_size
from saltire.rl.prompts import Codec
from saltire.rl.rollout import Rollout, TransformersRollout

Refresh = Callable[[], None]


def runs_on_decoder(config: RolloutConfig, model: PreTrainedModel) -> bool:
    """Whether our decoder samples; SaltireError if it is asked for and cannot."""
    if config.engine == "transformers":
        return False
    try:
        if model.device.type != "cpu":
            raise SaltireError(f"rollout.engine decoder: the model is on {model.device}.")
        other = {p.dtype for p in model.parameters() if p.requires_grad} - {torch.float32}
        if other:
            raise SaltireError(f"rollout.engine decoder: weights in {other.pop()} are not shared.")
        build_decoder(model)
    except SaltireError as error:
        if config.engine == "auto":
            return False
        raise SaltireError(f"{error} Set rollout.engine to transformers.") from None
    return True


def plain_copy(model: PreTrainedModel, lora: LoraConfig) -> PreTrainedModel:
    """A copy for merged weights, taken before adapters are put on; it shares what they leave."""
    adapted = {
        id(child.weight)
        for parent in model.modules()
        for name, child in parent.named_children()
        if name in lora.targets and hasattr(child, "weight")
    }
    shared = {} if world_size() > 1 else {
        id(p): p for p in model.parameters() if id(p) not in adapted
    }  # fmt: skip
    return copy.deepcopy(model, shared).requires_grad_(False)


def make_rollout(
    config: RolloutConfig,
    model: PreTrainedModel,
    plain: PreTrainedModel | None,
    on_decoder: bool,
    codec: Codec,
) -> tuple[Rollout, Refresh]:
    """The rollout and its ``refresh``; to be called before the model is sharded.

    plain: with LoRA under the decoder, what :func:`plain_copy` gave.
    """
    source, refresh = model, _nothing
    if world_size() > 1:
        source = copy.deepcopy(model).requires_grad_(False)
        copies = dict(source.named_parameters())

        def refresh() -> None:
            with torch.no_grad():
                for name, parameter in trained(model):
                    copies[name].copy_(whole(parameter))

    if not on_decoder:
        return TransformersRollout(source, codec.stop, codec.pad, config.batch), refresh
    if plain is None:
        return DecoderRollout(build_decoder(source), codec.stop, config.batch), refresh

    def refresh_and_merge() -> None:
        refresh()
        merge_lora(source, plain)

    return DecoderRollout(build_decoder(plain), codec.stop, config.batch), refresh_and_merge


def _nothing() -> None:
    """The weights are shared."""
