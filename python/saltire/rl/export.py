"""The trained model, as others read it: a model directory, or adapters in peft's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saltire.files import replacing_directory
from saltire.rl.checkpoint import trained, whole
from saltire.rl.config import LoraConfig, TrainConfig
from saltire.rl.distributed import barrier, rank
from saltire.rl.lora import save_adapter
from saltire.rl.policy import Policy
from saltire.rl.trainer import Parts


def export_model(config: TrainConfig, parts: Parts) -> Path:
    """Write the policy to ``output/model``, or ``output/adapter`` with LoRA; all ranks call it."""
    return write_policy(
        parts.policy, parts.codec.tokenizer, config.lora, config.model, Path(config.output)
    )


def write_policy(
    policy: Policy, tokenizer: Any, lora: LoraConfig | None, base: str, output: Path
) -> Path:
    """Write a policy below ``output``; ``base`` names the model that adapters belong to."""
    prefix = "model."  # the policy's name for the language model within it
    tensors = {name.removeprefix(prefix): whole(p) for name, p in trained(policy)}
    folder = output / ("model" if lora is None else "adapter")
    if rank() == 0:
        if lora is not None:
            save_adapter(tensors, lora, base, folder)
        else:
            with replacing_directory(folder) as directory:
                policy.model.save_pretrained(directory, state_dict=tensors)
                tokenizer.save_pretrained(directory)
    barrier()
    return folder
