"""``saltire doctor``: what is installed, what was built, what will be used, and what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import typer

from saltire import __version__
from saltire.cli import _console
from saltire.errors import SaltireError

# extra -> the packages that it brings
EXTRAS = {
    "data": ("datasets", "pyarrow", "zstandard"),
    "report": ("matplotlib",),
}


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(json: bool = _console.JSON_OPTION) -> None:
    """Tell what is installed, what will be used, and what is missing."""
    facts = collect()
    if json:
        _console.print_json(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            for extra, state in value.items():
                _console.out.print(f"[bold]extra {extra:<12}[/] {state}", highlight=False)
        else:
            _console.out.print(f"[bold]{name.replace('_', ' '):<18}[/] {value}", highlight=False)


def collect() -> dict[str, Any]:
    """Everything that ``doctor`` tells."""
    import torch

    from saltire import _C, ops

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "saltire": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (saltire was built with {_C.torch_version})",
        "transformers": version("transformers"),
        "compiler": _C.compiler,
        "threads": torch.get_num_threads(),
        "instruction_set": ops.isa_reason(),
        "cuda_kernels": _cuda(_C.cuda_archs, torch.version.cuda),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "default_model": _default_model(),
        "extras": {extra: _extra(extra, packages) for extra, packages in EXTRAS.items()},
    }


def _cuda(archs: str, torch_cuda: str | None) -> str:
    if archs:
        return f"built for {archs}"
    if torch_cuda is None:
        return "not built: this torch has no CUDA"
    return "not built: no nvcc was found. Put nvcc on PATH and install saltire again"


def _default_model() -> str:
    from saltire.models.default import default_model_path

    try:
        return str(default_model_path())
    except SaltireError as error:
        return str(error)


def _extra(extra: str, packages: tuple[str, ...]) -> str:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return "installed"
    return f"lacks {', '.join(missing)}: pip install 'saltire[{extra}]'"
