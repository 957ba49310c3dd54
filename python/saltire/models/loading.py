"""Loading a model and its tokenizer from wherever they are; never code from a stranger."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from saltire.errors import SaltireError
from saltire.models.default import default_model_path
from saltire.models.gguf_reading import reading_gguf_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "default"
MAX_HEADER_BYTES = 100 * 2**20  # the limit that the safetensors format sets itself


def load_model(
    spec: str | Path = DEFAULT_MODEL, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer.

    spec: ``"default"`` (SmolLM2-135M-Instruct), a directory as ``save_pretrained`` writes it (a
    Saltire checkpoint or an ordinary one), a ``.gguf`` file, or a name on the Hugging Face hub.
    dtype: of what is not quantised; default float32 on the CPU. Raises SaltireError for anything
    that is missing, damaged or not supported.
    """
    source, options = _source(spec)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options["trust_remote_code"] = False
    try:
        with _reading(options):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            model, info = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype or torch.float32, output_loading_info=True, **options
            )
    except SaltireError:
        raise
    except Exception as error:
        raise SaltireError(_cannot_load("", spec, options, error)) from error
    if info["missing_keys"]:  # transformers would go on with random values
        names = sorted(info["missing_keys"])
        raise SaltireError(
            f"{spec} lacks {len(names)} tensors of its model, among them {names[0]}. "
            "The checkpoint is incomplete; save or fetch it again."
        )
    if "gguf_file" in options:
        _forget_gguf(model)
    return model.eval(), tokenizer


def _forget_gguf(model: PreTrainedModel) -> None:
    """Let a model whose weights are plain floats be saved as one: transformers (5.24) goes on to
    call it quantised, and refuses."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "_weight_conversions"),
        (model.config, "quantization_config"),
    ):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False


def _cannot_load(what: str, spec: str | Path, options: Mapping[str, Any], error: Exception) -> str:
    if options.get("local_files_only"):
        return (
            f"{spec} is no directory here, and the hub is out of reach. Give the path of a model "
            "directory or a .gguf file, or 'default'."
        )
    return f"cannot load {what}{spec}: {_one_line(error)}"


def load_tokenizer(spec: str | Path = DEFAULT_MODEL) -> PreTrainedTokenizerBase:
    """The tokenizer alone; spec and errors as for ``load_model``."""
    source, options = _source(spec)
    from transformers import AutoTokenizer

    try:
        with _reading(options):
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except Exception as error:
        raise SaltireError(_cannot_load("the tokenizer of ", spec, options, error)) from error


def _reading(options: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    return reading_gguf_once() if "gguf_file" in options else contextlib.nullcontext()


def weight_bytes(spec: str | Path) -> int:
    """Bytes of the weight files of a local model."""
    source, options = _source(spec)
    folder = Path(source)
    if "gguf_file" in options:
        return (folder / options["gguf_file"]).stat().st_size
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _source(spec: str | Path) -> tuple[str, dict[str, Any]]:
    """What ``from_pretrained`` takes for a spec, after checking what lies on disk."""
    path = default_model_path() if str(spec) == DEFAULT_MODEL else Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SaltireError(f"there is no file {path}.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        check_model_directory(path)
        return str(path), {}
    if path.is_file():
        raise SaltireError(f"{path} is a file; expected a model directory or a .gguf file.")
    if path.is_absolute() or str(spec).startswith(".") or str(spec).count("/") > 1:
        raise SaltireError(f"there is no model directory {path}.")
    # Without a network the hub's client would retry for half a minute before it says so; a model
    # that it has fetched before is found all the same.
    return str(spec), {} if _hub_in_reach() else {"local_files_only": True}


def _hub_in_reach() -> bool:
    from urllib.parse import urlsplit

    from huggingface_hub import constants

    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def check_model_directory(path: Path) -> None:
    """Raise SaltireError unless a folder holds the config and whole weight files of a model."""
    if not (path / "config.json").is_file():
        raise SaltireError(f"{path} is not a model directory: it has no config.json.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SaltireError(f"{path / 'config.json'} is damaged: {error}.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise SaltireError(f"{path / 'config.json'} names no model_type; it is no model's config.")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise SaltireError(
            f"{path} holds no weights: expected *.safetensors. Save the model there again."
        )
    for file in files:
        check_safetensors(file)


def check_safetensors(path: Path) -> None:
    """Raise SaltireError unless the file is as long as its header says, and the header is sane."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise SaltireError(f"{path} is truncated or not a safetensors file. Fetch it again.")
        try:
            header = json.loads(file.read(header_bytes))
            ends = [
                int(entry["data_offsets"][1])
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise SaltireError(f"{path} has a damaged header. Fetch it again.") from None
    expected = 8 + header_bytes + max(ends, default=0)
    if size != expected:
        raise SaltireError(
            f"{path} is {size} bytes; its header promises {expected}. It was cut off or changed; "
            "fetch or save it again."
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text[:300] + " ...") if len(text) > 300 else text or type(error).__name__
