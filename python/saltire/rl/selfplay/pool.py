"""Past selves: snapshots of the trained weights, kept as files so that a resumed run has them."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.files import replacing_file
from saltire.rl.distributed import barrier, rank


class Pool:
    """The last ``keep`` snapshots of ``model``'s weights ``names``, in ``folder``.

    Files outlive their place in the pool for as long as a checkpoint might go back to them.
    """

    def __init__(self, folder: Path, model: nn.Module, names: list[str], keep: int) -> None:
        self.folder, self.model, self.names, self.keep = folder, model, names, keep
        self.steps: list[int] = []

    def add(self, step: int) -> None:
        """Take a snapshot of the present weights; every rank must call it."""
        if rank() == 0:
            weights = dict(self.model.named_parameters())
            tensors = {n: weights[n].detach().cpu().clone().contiguous() for n in self.names}
            with replacing_file(self._path(step)) as temporary:
                save_file(tensors, temporary)
        barrier()
        self.steps = [*self.steps, step][-self.keep :]

    def draw(self, seed: int, step: int) -> int:
        """The past self that this step plays against."""
        return Random(f"{seed}/{step}/past").choice(self.steps)

    def load(self, step: int, into: nn.Module) -> None:
        """Put a snapshot's weights into another copy of the model."""
        try:
            tensors: dict[str, Tensor] = load_file(self._path(step))
        except (OSError, SafetensorError) as error:
            raise SaltireError(
                f"the past self {self._path(step)} cannot be read ({error}); the run cannot go on "
                "without it. Start anew with another output."
            ) from error
        weights = dict(into.named_parameters())
        with torch.no_grad():
            for name in self.names:
                weights[name].copy_(tensors[name])

    def forget(self, oldest: int) -> None:
        """Remove the files of snapshots that are neither in the pool nor as young as ``oldest``."""
        if rank() == 0 and self.folder.is_dir():
            for path in self.folder.glob("*.safetensors"):
                if path.stem.isdigit() and int(path.stem) < min([oldest, *self.steps]):
                    path.unlink()

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08d}.safetensors"
