"""Saving a checkpoint whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from saltire.errors import SaltireError
from saltire.files import replacing_directory

if TYPE_CHECKING:  # see hf_quantizer.py
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, out: str | Path
) -> int:
    """Write model and tokenizer to the directory ``out``; returns the bytes of its weights.

    Everything goes to a temporary directory that takes ``out``'s place at the end, so a full disk
    or a kill leaves an older checkpoint whole. Raises SaltireError if ``out`` cannot be written or
    holds something that is not a checkpoint.
    """
    out = Path(out)
    check_destination(out)
    with replacing_directory(out) as directory:
        try:
            model.save_pretrained(directory)
            if tokenizer is not None:
                tokenizer.save_pretrained(directory)
        except OSError:
            raise
        except Exception as error:
            # safetensors reports a full disk as its own error, not as an OSError.
            if "No space left" in str(error) or shutil.disk_usage(directory).free < 2**20:
                raise OSError(28, "No space left on device") from error
            raise
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def check_destination(out: Path) -> None:
    """Raise SaltireError if ``out`` cannot be written, or holds something else than a model.

    Tries it for real, before hours of work: permissions alone do not tell.
    """
    if out.is_dir():
        usable = (out / "config.json").exists() or not any(out.iterdir())
    else:
        usable = not out.exists()
    if not usable:
        raise SaltireError(
            f"{out} exists and is not a model directory; it is left alone. Choose another place."
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}."):
            pass
    except OSError as error:
        raise SaltireError(
            f"cannot write {out}: {error.strerror or error}. Choose another place."
        ) from error
