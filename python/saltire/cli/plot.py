"""``saltire plot RUN...``: curves of training runs."""

from __future__ import annotations

from pathlib import Path

import typer

from saltire.cli import _console


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("plot")(plot)


def plot(
    runs: list[str] = typer.Argument(
        ..., metavar="RUN...", help="output folders, or folders above several; NAME=FOLDER names it"
    ),
    out: Path = typer.Option(Path("curves"), help="where to write: OUT.png and OUT.html"),
    columns: str = typer.Option("", help="draw these columns of the log: seconds,grad_norm"),
    as_json: bool = _console.JSON_OPTION,
) -> None:
    """Draw training runs over steps: entropy against target, actuator, reward, Pass@k.

    Runs that differ in their seed alone are drawn as one: their mean, with a band over the seeds.
    A run that is still going can be drawn too.
    """
    from saltire.report.curves import PANELS, Panel, arrange, draw_png, write_page
    from saltire.report.runs import read_groups

    groups = read_groups(runs)
    asked = [name.strip() for name in columns.split(",") if name.strip()]
    pictures = arrange(groups, [Panel(name, (name,)) for name in asked] or PANELS)
    base = out.with_suffix("") if out.suffix in (".png", ".html") else out
    files = [base.with_name(base.name + suffix) for suffix in (".png", ".html")]
    draw_png(groups, pictures, files[0])
    title = ", ".join(group.name for group in groups)
    write_page(groups, pictures, title, files[1])
    if as_json:
        _console.print_json(
            {
                "files": [str(file) for file in files],
                "groups": {group.name: [str(r.folder) for r in group.runs] for group in groups},
            }
        )
        return
    for group in groups:
        count, steps = len(group.runs), min(len(run.records) for run in group.runs)
        seeds = "1 run" if count == 1 else f"{count} seeds"
        _console.out.print(f"{group.name}: {seeds}, {steps} steps", highlight=False, markup=False)
    _console.out.print(f"drawn to {files[0]} and {files[1]}", highlight=False, markup=False)
