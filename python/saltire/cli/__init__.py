"""The ``saltire`` command. Each file here is a verb and has ``register(app)``."""

from __future__ import annotations

import importlib
import pkgutil

import typer

from saltire.cli import _console


def build_app() -> typer.Typer:
    """The command with every verb of this folder, in alphabetical order."""
    app = typer.Typer(
        name="saltire",
        help="Low-bit inference, lossless self-speculation, entropy-scheduled RL, long context.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        if not module.startswith("_"):
            importlib.import_module(f"{__name__}.{module}").register(app)
    return app


def main() -> None:
    """Run the command; bad input prints one line and exits with 2."""
    _console.run(build_app())
