"""``saltire doctor``: what is installed, what was built, what will be used, and what is missing."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from typing import Any

import typer
from rich.markup import escape

from saltire import __version__
from saltire.cli import _console
from saltire.errors import SaltireError

EXTRA_OF = re.compile(r"""^([A-Za-z0-9._-]+).*;.*\bextra\s*==\s*["']([a-z0-9-]+)["']""")


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
                _console.out.print(
                    f"[bold]extra {extra:<12}[/] {escape(str(state))}", highlight=False
                )
        else:
            _console.out.print(
                f"[bold]{name.replace('_', ' '):<18}[/] {escape(str(value))}", highlight=False
            )


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
        "cuda_kernels": _cuda(_C.cuda_archs, torch.version.cuda, _C.torch_version),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "default_model": _default_model(),
        "extras": {extra: _extra(extra, packages) for extra, packages in _extras().items()},
    }


def _cuda(archs: str, torch_cuda: str | None, built_with: str) -> str:
    if archs:
        return f"built for {archs}"
    if torch_cuda is None:
        return "not built: this torch has no CUDA"
    if built_with.endswith("+cpu"):
        return (
            f"not built: saltire was built with torch {built_with}, which has no CUDA. Build it "
            "with this torch: pip install --no-build-isolation ."
        )
    return "not built: no nvcc was found. Put nvcc on PATH and install saltire again"


def _default_model() -> str:
    from saltire.models.default import default_model_path

    try:
        return str(default_model_path())
    except SaltireError as error:
        return str(error)


def _extras() -> dict[str, list[str]]:
    """The packages of each extra, as the installed package's own metadata lists them."""
    extras: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("saltire") or []:
        found = EXTRA_OF.match(requirement)
        if found and found[2] != "dev":
            extras.setdefault(found[2], []).append(found[1])
    return extras


def _extra(extra: str, packages: list[str]) -> str:
    missing = [package for package in packages if not _is_installed(package)]
    if not missing:
        return "installed"
    return f"lacks {', '.join(missing)}: pip install 'saltire[{extra}]'"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
