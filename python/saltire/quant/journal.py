"""What a run has finished, on disk, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
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
VERSION = 2
SAMPLED = 1024  # values of each tensor that tell one model from another

# What a fact is called in an error, in the order in which they are compared: the model comes last,
# as ``stream`` decides which of its values are looked at.
NAMES = {
    "version": "version of the directory",
    "stream": "setting of --stream",
    "recipe": "recipe",
    "calibration": "calibration text",
    "samples": "number of samples",
    "length": "length of samples",
    "batch": "batch",
    "seed": "seed",
    "processes": "number of processes",
    "model": "model",
}


def fingerprint(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]] | None = None
) -> str:
    """What tells one model from another: a hash over the names and shapes of all tensors and up to
    1,024 values of each, spread evenly. shapes: of the whole tensors, where ``tensors`` are parts.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().flatten()
        shape = tensors[name].shape if shapes is None else shapes[name]
        digest.update(f"{name} {list(shape)}".encode())
        count = min(SAMPLED, len(values))
        places = torch.arange(count) * (len(values) - 1) // max(1, count - 1)
        digest.update(values[places].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Journal:
    """A directory of finished blocks, each a safetensors file with the formats of its layers.

    Every file appears whole or not at all. Block i counts as finished once its file is there; the
    hidden states of the calibration text lie beside it (``states``), and those that block i reads
    are not touched before that. Every file names the run that it is of, so that one copied in from
    another is told apart. Only the first process writes blocks.
    """

    def __init__(self, directory: Path, facts: Mapping[str, Any], *, resume: bool) -> None:
        """facts: what must be the same in the run that goes on; of the model, its ``name`` need not
        be. Raises SaltireError for a directory of another run, naming what differs, and for one
        that is there without ``resume``."""
        self.directory = directory
        facts = json.loads(json.dumps({"version": VERSION, **facts}))  # as they are read back
        self._run = _run_of(facts)
        self._made = False
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
            self._made = True
            with self.removed_if_refused(), replacing_file(directory / FACTS) as path:
                path.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        processes.barrier()

    @contextlib.contextmanager
    def removed_if_refused(self) -> Iterator[None]:
        """Remove the directory when a SaltireError passes, if this run made it and has finished no
        block: the corrected command then finds its place free. In the first process only, and
        without waiting for the others, which may have met no error."""
        try:
            yield
        except SaltireError:
            if self._made and not self.block_file(0).exists():
                shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def _check(self, facts: Mapping[str, Any]) -> None:
        try:
            found = dict(json.loads((self.directory / FACTS).read_text(encoding="utf-8")))
            names = [*NAMES, *sorted((set(found) | set(facts)) - set(NAMES))]
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
        """The calibration tokens of the run, int64 [samples, T], if they have been kept. Raises
        SaltireError for those of another run, and if they have gone since a block was finished."""
        path = self.directory / TOKENS
        if path.exists():
            return self._read_ours(path, "tokens")[0]["tokens"]
        if self.block_file(0).exists():
            raise SaltireError(
                f"{path} is missing, and finished blocks were made from it. Remove "
                f"{self.directory} and start again."
            )
        return None

    def keep_tokens(self, tokens: Tensor) -> None:
        """Keep the calibration tokens, so that going on does not sample others."""
        if processes.rank() == 0:
            _write(self.directory / TOKENS, {"tokens": tokens}, self._marks("tokens"))

    def states(self) -> tuple[Path, Path]:
        """Files for the hidden states before even and before odd blocks, of this process."""
        rank = processes.rank()
        return self.directory / f"states-{rank}-even", self.directory / f"states-{rank}-odd"

    def finished(self) -> int:
        """How many blocks are finished. Raises SaltireError if one of them has gone since, or if
        what is said of it cannot be read."""
        count = 0
        while self.block_file(count).exists():
            count += 1
        if count < self._promised():
            raise SaltireError(
                f"{self.block_file(count)} is missing, and later blocks were made from it. Remove "
                f"{self.directory} and start again."
            )
        return count

    def _promised(self) -> int:
        """How many blocks were said to be finished; the last of them may have come after that."""
        path = self.directory / PROGRESS
        if not path.exists():
            return 0
        try:
            text = path.read_bytes().decode("ascii", "replace")
        except OSError as error:
            text = f"an error: {error.strerror}"
        if not text.isdecimal():
            raise SaltireError(
                f"{path} is damaged: expected the number of finished blocks, came {text[:40]!r}. "
                f"Remove {self.directory} and start again."
            )
        return int(text)

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
            metadata = {"formats": json.dumps(dict(formats)), **self._marks(f"block {index}")}
            _write(self.block_file(index), tensors, metadata)
            with replacing_file(self.directory / PROGRESS) as path:
                path.write_text(str(index + 1))
        processes.barrier()

    def formats(self, index: int) -> dict[str, dict[str, Any]]:
        """The formats of a finished block's layers, by full name. Raises SaltireError for a block
        of another run."""
        return json.loads(self._read_ours(self.block_file(index), f"block {index}")[1]["formats"])

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of a finished block, by full name. Raises SaltireError for a block of another
        run."""
        return self._read_ours(self.block_file(index), f"block {index}")[0]

    def _marks(self, what: str) -> dict[str, str]:
        return {"run": self._run, "part": what}

    def _read_ours(self, path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, metadata = _read(path)
        for name, here in self._marks(what).items():
            if (there := metadata.get(name, "nothing")) != here:
                raise SaltireError(
                    f"{path} does not belong to this run: expected {name} {here!r}, came "
                    f"{there!r}. Remove {self.directory} and start again."
                )
        return tensors, metadata

    def remove(self) -> None:
        """The run has ended: nothing of this is needed any more."""
        processes.barrier()
        if processes.rank() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)


def _run_of(facts: Mapping[str, Any]) -> str:
    """What tells one run from another: a hash of its facts without the model's name."""
    model = facts.get("model")
    if isinstance(model, dict):
        facts = {**facts, "model": model.get("fingerprint")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


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
