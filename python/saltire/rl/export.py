"""The trained model, as others read it: a model directory, or adapters in peft's format."""

from __future__ import annotations

from pathlib import Path

from saltire.files import replacing_directory
from saltire.rl.checkpoint import trained, whole
from saltire.rl.config import TrainConfig
from saltire.rl.distributed import barrier, rank
from saltire.rl.lora import save_adapter
from saltire.rl.trainer import Parts


def export_model(config: TrainConfig, parts: Parts) -> Path:
    """Write the policy to ``output/model``, or ``output/adapter`` with LoRA; all ranks call it."""
    prefix = "model."  # the policy's name for the language model within it
    tensors = {name.removeprefix(prefix): whole(p) for name, p in trained(parts.policy)}
    folder = Path(config.output) / ("model" if config.lora is None else "adapter")
    if rank() == 0:
        if config.lora is not None:
            save_adapter(tensors, config.lora, config.model, folder)
        else:
            with replacing_directory(folder) as directory:
                parts.policy.model.save_pretrained(directory, state_dict=tensors)
                parts.codec.tokenizer.save_pretrained(directory)
    barrier()
    return folder
