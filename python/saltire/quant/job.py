"""From a model on disk to a quantised checkpoint on disk: resumable, if wanted block by block."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saltire import processes
from saltire.errors import SaltireError
from saltire.files import replacing_directory
from saltire.models.adapters import Adapter, adapter_for
from saltire.models.loading import load_model
from saltire.models.saving import check_destination, save_checkpoint
from saltire.models.streaming import EMBEDDING, StreamedWeights, empty_module, open_streamed
from saltire.quant.journal import Journal, fingerprint
from saltire.quant.quantize import Observer, Pass, attach_config, quantize, share_of
from saltire.quant.recipe import Recipe
from saltire.quant.texts import calibration_tokens


@dataclass(frozen=True)
class Job:
    """What to quantise, where to, and on what text; see ``quantize`` for the last five.

    stream: read the weights block by block and write each block as it is finished, so that memory
    for one block is enough; the calibration text must then be a file or a data set. resume: go on
    with a run of the same job that was killed; it ends with the same bits.
    """

    model: str
    out: Path
    recipe: Recipe
    calibration: str = "self"
    samples: int = 16
    length: int = 512
    batch: int = 4
    seed: int = 0
    stream: bool = False
    resume: bool = False

    @property
    def directory(self) -> Path:
        """Where a run keeps what it has finished, beside ``out``."""
        return self.out.with_name(self.out.name + ".partial")

    def journal(self, model: str) -> Journal:
        """The journal of this job on a model with such a fingerprint."""
        facts = {
            "model": {"name": self.model, "fingerprint": model},
            "stream": self.stream,
            "recipe": asdict(self.recipe),
            "calibration": self.calibration,
            "samples": self.samples,
            "length": self.length,
            "batch": self.batch,
            "seed": self.seed,
            "processes": processes.world_size(),
        }
        return Journal(self.directory, facts, resume=self.resume)


@torch.no_grad()
def run(job: Job, observer: Observer | None = None) -> int:
    """Do the job; returns the bytes of the new weights.

    What is finished lies in ``job.directory`` until the checkpoint stands; a kill or a full disk
    loses at most the block in work. A run that is refused before its first block is finished leaves
    no directory. Raises SaltireError for a directory of another run.
    """
    check_destination(job.out)
    if job.resume and not job.directory.exists():
        raise SaltireError(
            f"there is nothing to resume: no {job.directory}. Leave out --resume to start."
        )
    return _streamed(job, observer) if job.stream else _resident(job, observer)


def _resident(job: Job, observer: Observer | None) -> int:
    model, tokenizer = load_model(job.model)
    adapter = adapter_for(model.config)
    journal = job.journal(fingerprint(_identity(dict(model.named_parameters()), adapter)))
    with journal.removed_if_refused():
        quantize(
            model,
            tokenizer,
            job.recipe,
            job.calibration,
            samples=job.samples,
            length=job.length,
            batch=job.batch,
            seed=job.seed,
            journal=journal,
            observer=observer,
        )
    size = save_checkpoint(model, tokenizer, job.out) if processes.rank() == 0 else 0
    journal.remove()
    return size


class _FromFiles:
    """Blocks come from files and leave memory when they are finished."""

    def __init__(self, weights: StreamedWeights, adapter: Adapter, tied: bool) -> None:
        self._weights = weights
        self._renamed = {adapter.head_path: EMBEDDING} if tied else {}

    def fill(self, module: nn.Module, prefix: str) -> None:
        self._weights.fill(module, self._renamed.get(prefix, prefix))

    def empty(self, module: nn.Module) -> None:
        empty_module(module)


def _streamed(job: Job, observer: Observer | None) -> int:
    if job.recipe.low_rank is not None:
        raise SaltireError(
            f"the recipe {job.recipe.name} deals out ranks over the whole model; it cannot stream."
        )
    if job.recipe.learning is not None and job.recipe.learning.epochs:
        raise SaltireError(
            "learning end to end needs the whole model in memory. Use --effort fast with --stream."
        )
    if job.recipe.mixed:
        raise SaltireError(
            "a budget is dealt out over the whole model; it cannot stream. Leave out --stream."
        )
    model, tokenizer, weights = open_streamed(Path(job.model).expanduser())
    if job.calibration == "self":
        raise SaltireError(
            "a streamed model cannot write its own calibration text. Give a text file or a data "
            "set by --calibration."
        )
    adapter = adapter_for(model.config)
    journal = job.journal(_fingerprint_of_files(weights, adapter))
    tied = f"{adapter.head_path}.weight" not in weights
    source = _FromFiles(weights, adapter, tied)
    with journal.removed_if_refused():
        tokens = journal.tokens()
        if tokens is None:
            tokens = calibration_tokens(
                job.calibration,
                None,
                tokenizer,
                samples=job.samples,
                length=job.length,
                seed=job.seed,
            )
            journal.keep_tokens(tokens)
        part, batch = share_of(tokens, job.batch)
        source.fill(model.get_submodule(EMBEDDING), EMBEDDING)
        formats = Pass(model, adapter, job.recipe, part, batch, source, journal, observer).run()
    size = 0
    if processes.rank() == 0:
        attach_config(model, job.recipe, formats)
        if job.recipe.rounds_head:
            model.config.tie_word_embeddings = False
        rest = _rest(model, adapter, source, getattr(torch, job.recipe.rest_dtype), formats)
        size = _assemble(job, journal, len(adapter.blocks(model)), rest, model, tokenizer)
    journal.remove()
    return size


def _rest(
    model: PreTrainedModel, adapter: Adapter, source: _FromFiles, dtype: torch.dtype, formats: Any
) -> dict[str, Tensor]:
    """What lies outside the blocks, as it is stored: embedding, norm and head."""
    tensors: dict[str, Tensor] = {}
    for prefix in (EMBEDDING, adapter.norm_path, adapter.head_path):
        module = model.get_submodule(prefix)
        if prefix not in formats and any(p.is_meta for p in module.parameters()):
            if prefix == adapter.head_path and model.config.tie_word_embeddings:
                continue
            source.fill(module, prefix)
        for name, tensor in module.state_dict().items():
            kept = prefix in formats or not tensor.is_floating_point()
            tensors[f"{prefix}.{name}"] = tensor if kept else tensor.to(dtype)
    return tensors


def _assemble(
    job: Job, journal: Journal, blocks: int, rest: dict[str, Tensor], model: Any, tokenizer: Any
) -> int:
    count = blocks + 1
    with replacing_directory(job.out) as folder:
        weight_map: dict[str, str] = {}
        total = 0
        for index in range(count):
            name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            if index < blocks:
                tensors = journal.tensors(index)
                _link(journal.block_file(index), folder / name)
            else:
                tensors = rest
                whole = {name: t.detach().contiguous() for name, t in rest.items()}
                (folder / name).write_bytes(safetensors.torch.save(whole, {"format": "pt"}))
            weight_map |= dict.fromkeys(tensors, name)
            total += sum(t.nbytes for t in tensors.values())
        index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_file, indent=1))
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return sum(file.stat().st_size for file in job.out.glob("*.safetensors"))


def _link(source: Path, target: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _identity(parameters: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    prefixes = tuple(f"{prefix}." for prefix in _identifying(adapter))
    return {name: t for name, t in parameters.items() if name.startswith(prefixes)}


def _fingerprint_of_files(weights: StreamedWeights, adapter: Adapter) -> str:
    names = [name for prefix in _identifying(adapter) for name in weights.names(prefix)]
    samples = {name: weights.sample_of(name) for name in names}
    return fingerprint(
        {name: values for name, (values, _) in samples.items()},
        {name: shape for name, (_, shape) in samples.items()},
    )


def _identifying(adapter: Adapter) -> tuple[str, ...]:
    """Where the tensors lie that tell one model from another; a tied head is the embedding."""
    return EMBEDDING, adapter.blocks_path, adapter.norm_path, adapter.head_path
