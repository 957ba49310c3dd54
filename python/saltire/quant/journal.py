"""What a run has finished, on disk, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from saltire import processes
from saltire.errors import SaltireError
from saltire.files import replacing_file

FACTS, TOKENS, PROGRESS = "run.json", "tokens.safetensors", "finished"
VERSION = 1

# What a fact is called in an error, and what can be done about it.
NAMES = {
    "version": "version of the directory",
    "model": "model",
    "recipe": "recipe",
    "calibration": "calibration text",
    "samples": "number of samples",
    "length": "length of samples",
    "batch": "batch",
    "seed": "seed",
    "processes": "number of processes",
}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """What tells one model from another: a hash over names, shapes and the first values of all."""
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {list(tensor.shape)}".encode())
        values = tensor.detach()[:1].flatten()[:1024] if tensor.dim() > 1 else tensor[:1024]
        digest.update(values.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Journal:
    """A directory of finished blocks, each a safetensors file with the formats of its layers.

    Every file appears whole or not at all. Block i counts as finished once its file is there; the
    hidden states of the calibration text lie beside it (``states``), and those that block i reads
    are not touched before that. Only the first process writes blocks.
    """

    def __init__(self, directory: Path, facts: Mapping[str, Any], *, resume: bool) -> None:
        """facts: what must be the same in the run that goes on; of the model, its ``name`` need not
        be. Raises SaltireError for a directory of another run, naming what differs, and for one
        that is there without ``resume``."""
        self.directory = directory
        facts = json.loads(json.dumps({"version": VERSION, **facts}))  # as they are read back
        if directory.exists():
            if not resume:
                raise SaltireError(
                    f"{directory} holds a run that did not end. Go on with it by --resume, or "
                    "remove it."
                )
            self._check(facts)
        processes.barrier()
        if processes.rank() == 0 and not directory.exists():
            try:
                directory.mkdir(parents=True)
            except OSError as error:
                raise SaltireError(f"cannot make {directory}: {error.strerror}.") from None
            with replacing_file(directory / FACTS) as path:
                path.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        processes.barrier()

    def _check(self, facts: Mapping[str, Any]) -> None:
        try:
            found = json.loads((self.directory / FACTS).read_text(encoding="utf-8"))
            names = sorted(set(found) | set(facts))
        except (OSError, ValueError, TypeError):
            raise SaltireError(
                f"{self.directory} is no directory of a run: {FACTS} is missing or damaged. "
                "Remove the directory and start again."
            ) from None
        for name in names:
            there, here = found.get(name), facts.get(name)
            same = there == here
            if name == "model" and isinstance(there, dict) and isinstance(here, dict):
                same = there.get("fingerprint") == here.get("fingerprint")
            if not same:
                raise SaltireError(
                    f"{self.directory} belongs to a run with another {NAMES.get(name, name)}: "
                    f"{_difference(there, here)}. Resume with what it was started with, or choose "
                    "another place."
                )

    def tokens(self) -> Tensor | None:
        """The calibration tokens of the run, int64 [samples, T], if they have been kept."""
        path = self.directory / TOKENS
        return _read(path)[0]["tokens"] if path.exists() else None

    def keep_tokens(self, tokens: Tensor) -> None:
        """Keep the calibration tokens, so that going on does not sample others."""
        if processes.rank() == 0:
            _write(self.directory / TOKENS, {"tokens": tokens}, {})

    def states(self) -> tuple[Path, Path]:
        """Files for the hidden states before even and before odd blocks, of this process."""
        rank = processes.rank()
        return self.directory / f"states-{rank}-even", self.directory / f"states-{rank}-odd"

    def finished(self) -> int:
        """How many blocks are finished. Raises SaltireError if one of them has gone since."""
        count, progress = 0, self.directory / PROGRESS
        while self.block_file(count).exists():
            count += 1
        if progress.exists() and count < int(progress.read_text()):
            raise SaltireError(
                f"{self.block_file(count)} is missing, and later blocks were made from it. Remove "
                f"{self.directory} and start again."
            )
        return count

    def block_file(self, index: int) -> Path:
        """The file of a finished block."""
        return self.directory / f"block-{index:05d}.safetensors"

    def keep_block(
        self,
        index: int,
        prefix: str,
        block: nn.Module,
        formats: Mapping[str, Mapping[str, Any]],
        rest: torch.dtype,
    ) -> None:
        """Keep a finished block as a checkpoint has it: its tensors under full names, those of no
        quantised layer in ``rest``; its layers' formats beside them."""
        if processes.rank() == 0:
            ours = tuple(f"{name}." for name in formats)
            tensors = {f"{prefix}.{name}": t for name, t in block.state_dict().items()}
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not name.startswith(ours):
                    tensors[name] = tensor.to(rest)
            _write(self.block_file(index), tensors, {"formats": json.dumps(dict(formats))})
            with replacing_file(self.directory / PROGRESS) as path:
                path.write_text(str(index + 1))
        processes.barrier()

    def formats(self, index: int) -> dict[str, dict[str, Any]]:
        """The formats of a finished block's layers, by full name."""
        return json.loads(_read(self.block_file(index))[1]["formats"])

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block, by full name."""
        return _read(self.block_file(index))[0]

    def remove(self) -> None:
        """The run has ended: nothing of this is needed any more."""
        processes.barrier()
        if processes.rank() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        parts = [
            f"{name} {there.get(name)!r} there, {here.get(name)!r} here"
            for name in sorted(set(there) | set(here))
            if there.get(name) != here.get(name)
        ]
        return "; ".join(parts)
    return f"{there!r} there, {here!r} here"


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with replacing_file(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(whole, {"format": "pt", **metadata}))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {n: torch.clone(file.get_tensor(n)) for n in names}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise SaltireError(
            f"cannot read {path}: {error}. Remove {path.parent} and start again."
        ) from None
