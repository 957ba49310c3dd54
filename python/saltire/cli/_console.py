"""What the verbs share: tables for people, JSON for machines, one line for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

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
