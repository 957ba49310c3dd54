"""Checkpoints of a training run: whole or not there, never a pickle, the same for any world size.

    checkpoints/00000040/weights.safetensors    trained parameters, by name
                         optimiser.safetensors  AdamW's moments and step counts, name/moment
                         state.json             step, controller, curriculum, …: plain numbers

Randomness needs no place here: prompts and samples are drawn from counters that the step gives.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from saltire.errors import SaltireError
from saltire.files import replacing_directory
from saltire.rl.distributed import barrier, rank

WEIGHTS, OPTIMISER, STATE = "weights.safetensors", "optimiser.safetensors", "state.json"
FORMAT = 1


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of ``step`` below ``folder`` and remove all but the last ``keep``.

    Every rank must call it: sharded tensors are gathered; rank 0 writes.
    """
    weights = {name: whole(p) for name, p in trained(module)}
    moments = {}
    for name, parameter in trained(module):
        for key, value in optimiser.state.get(parameter, {}).items():
            moments[f"{name}/{key}"] = whole(value)
    target = folder / f"{step:08d}"
    if rank() == 0:
        with replacing_directory(target) as directory:
            save_file(weights, directory / WEIGHTS)
            save_file(moments, directory / OPTIMISER)
            content = {"format": FORMAT, "step": step, **state}
            (directory / STATE).write_text(json.dumps(content))
        for old in all_steps(folder)[:-keep]:
            shutil.rmtree(folder / f"{old:08d}")
    barrier()
    return target


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint below ``folder``; leavings of a killed write are passed over."""
    steps = all_steps(folder)
    return folder / f"{steps[-1]:08d}" if steps else None


def all_steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, in order."""
    if not folder.is_dir():
        return []
    return sorted(
        int(entry.name)
        for entry in folder.iterdir()
        if entry.name.isdigit() and (entry / STATE).is_file()
    )


def load(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's weights and moments in place; return the rest of its state.

    Raises SaltireError if the checkpoint is damaged or of another model, before anything changes.
    """
    parameters = dict(trained(module))
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise SaltireError(f"{path / STATE} is not of format {FORMAT}; it cannot be resumed.")
        weights = dict(_tensors(path / WEIGHTS))
        moments = dict(_tensors(path / OPTIMISER))
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, SaltireError):
            raise
        raise SaltireError(
            f"the checkpoint {path} is damaged ({error}). Remove it to resume from the one before."
        ) from error
    _check_shapes(path, weights, parameters)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(like(weights[name], parameter))
    optimiser.state.clear()
    for name, value in moments.items():
        owner, _, key = name.rpartition("/")
        if owner not in parameters:
            raise SaltireError(f"the checkpoint {path} has moments of {owner}, not trained here.")
        parameter = parameters[owner]
        placed = like(value, parameter) if value.shape == parameter.shape else value
        optimiser.state[parameter][key] = placed
    return state


def trained(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that training changes, by name."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


def whole(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU; a sharded tensor is gathered first, by all ranks."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().clone().contiguous()


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor`` where and as ``parameter`` is: its device, its shards."""
    tensor = tensor.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
    return tensor


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (safe_open is not iterable)
            yield name, file.get_tensor(name)


def _check_shapes(
    path: Path, weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> None:
    for name, parameter in parameters.items():
        found = weights.get(name)
        if found is None or found.shape != parameter.shape:
            came = "nothing" if found is None else str(list(found.shape))
            raise SaltireError(
                f"the checkpoint {path} has {came} for {name}; this run has "
                f"{list(parameter.shape)}. It is of another model or of other lora settings: "
                "choose another output directory."
            )
    extra = sorted(set(weights) - set(parameters))
    if extra:
        raise SaltireError(
            f"the checkpoint {path} also trains {extra[0]}, which this run does not: choose "
            "another output directory."
        )
