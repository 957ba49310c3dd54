"""Models whose weights stay in their files until a block needs them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.models.adapters import adapter_for
from saltire.models.loading import check_model_directory, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens"
SAMPLED_ROWS = 8


class StreamedWeights:
    """The tensors of a directory's safetensors files, read one by one."""

    def __init__(self, folder: Path) -> None:
        """Raises SaltireError if the folder holds no whole model."""
        check_model_directory(folder)
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)
        index = folder / INDEX
        if index.is_file():
            promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            missing = sorted(set(promised) - set(self._files))
            if missing:
                raise SaltireError(
                    f"{folder} lacks {len(missing)} tensors that its index names, among them "
                    f"{missing[0]}. Fetch or save it again."
                )
        self.folder = folder

    def names(self, prefix: str) -> list[str]:
        """The tensors under a module's name."""
        return sorted(name for name in self._files if name.startswith(f"{prefix}."))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> Tensor:
        """One tensor, in float32 and in memory of its own."""
        return next(self._read([name]))[1]

    def sample_of(self, name: str) -> tuple[Tensor, list[int]]:
        """Up to 8 rows of a tensor, spread evenly, or all of a vector; and the whole shape."""
        with safe_open(self._files[name], "pt") as file:
            whole = file.get_slice(name)
            shape = list(whole.get_shape())
            if len(shape) < 2:
                return whole[:].clone(), shape
            count = min(SAMPLED_ROWS, shape[0])
            rows = [k * (shape[0] - 1) // max(1, count - 1) for k in range(count)]
            return torch.cat([whole[row : row + 1] for row in rows]), shape

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Read the parameters of a module that lies on the meta device."""
        state = {name.removeprefix(f"{prefix}."): t for name, t in self._read(self.names(prefix))}
        wanted = {name for name, _ in module.named_parameters()}
        if wanted - set(state):
            raise SaltireError(
                f"{self.folder} lacks {prefix}.{min(wanted - set(state))}. The model is "
                "incomplete; fetch or save it again."
            )
        module.load_state_dict({name: state[name] for name in wanted}, assign=True, strict=False)
        module.requires_grad_(False)

    def _read(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        try:
            for path in sorted({self._files[name] for name in names}):
                with safe_open(path, "pt") as file:
                    for name in names:
                        if self._files[name] == path:
                            # A copy: what is read lies in the mapped file, which is let go of.
                            yield name, file.get_tensor(name).to(torch.float32, copy=True)
        except (OSError, SafetensorError) as error:
            raise SaltireError(f"cannot read {self.folder}: {error}. Fetch it again.") from None


def empty_module(module: nn.Module) -> None:
    """Let go of a module's tensors; their shapes stay."""
    module.to("meta")


def open_streamed(
    folder: Path,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, StreamedWeights]:
    """A model of which nothing but the rotary table is in memory, its tokenizer and its weights.

    Raises SaltireError for anything that is not a directory with a supported architecture in
    safetensors files.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if not folder.is_dir():
        raise SaltireError(f"{folder} is no directory; only a model directory can be streamed.")
    weights = StreamedWeights(folder)
    config: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    adapter = adapter_for(config)
    if getattr(config, "quantization_config", None) is not None:
        raise SaltireError("the model is already quantised. Start from the original model.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    body = model.get_submodule(adapter.blocks_path.rsplit(".", 1)[0])
    rotary = body.get_submodule("rotary_emb")
    body.rotary_emb = type(rotary)(config)  # computed, not stored
    return model, load_tokenizer(folder), weights
