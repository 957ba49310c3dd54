"""What the verbs share: tables for people, JSON for machines, one line for an error."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from saltire.errors import SaltireError

out = Console()
err = Console(stderr=True)

JSON_OPTION = typer.Option(False, "--json", help="Print one JSON object instead of text.")


def run(app: typer.Typer) -> None:
    """Run ``app``; a SaltireError becomes one line on stderr and exit status 2."""
    try:
        app()
    except SaltireError as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)


def note(message: str) -> None:
    """One line on stderr of what is worth knowing and stops nothing."""
    err.print(f"[yellow]note:[/] {escape(message)}", highlight=False, soft_wrap=True)


@contextmanager
def warnings_as_notes() -> Iterator[None]:
    """Within it, a UserWarning is a note, without the place in the code that it came from."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def as_note(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if category is UserWarning:
                note(str(message))
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = as_note
        yield


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on one line, as the last thing on stdout."""
    sys.stdout.write(json.dumps(data) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A rich table; every column but the first is right-aligned."""
    result = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result
