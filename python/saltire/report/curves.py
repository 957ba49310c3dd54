"""Curves of training runs over steps: a PNG, and a page that stands alone.

What is drawn is a list of panels. A panel names columns of the log; one whose columns no run has is
left out, so that a kind of training adds its panels to ``PANELS`` and disturbs no other.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from saltire.errors import MissingExtraError, SaltireError
from saltire.files import replacing_file
from saltire.report.runs import Curve, Group


@dataclass(frozen=True)
class Panel:
    """Columns of the log in one picture; ``*`` in a column's name stands for anything.

    reference: a column drawn dashed beside them, such as a target. idle: leave the panel out where
    every value is this one, for what most runs do not use.
    """

    title: str
    columns: tuple[str, ...]
    unit: str = ""
    reference: str = ""
    idle: float | None = None


PANELS: tuple[Panel, ...] = (
    Panel("entropy", ("entropy",), "nats", reference="target"),
    Panel("actuator", ("actuator",)),
    Panel("reward", ("reward",), "mean of a step"),
    Panel("Pass@k, held out", ("pass@*",), "share of prompts"),
    Panel("tokens held by a clip", ("clipped_*",), "share"),
    Panel("length", ("length",), "tokens"),
    Panel("KL to the reference", ("kl",), "nats", idle=0.0),
    Panel("how matches end", ("share *",), "share of matches"),
    Panel("entropy of how they end", ("match_entropy",), "of log K"),
    Panel("win rate, evaluated", ("win_rate",), "draws count half"),
    Panel("forfeits", ("forfeits",), "share of matches", idle=0.0),
    Panel("baselines", ("dept/*/fast", "dept/*/slow"), "reward"),
    Panel("divergence of the baselines", ("dept/*/divergence",), "reward"),
    Panel("push out of an impasse, λ", ("dept/*/lambda",)),
    Panel("gradient norm", ("grad_norm",), "before clipping"),
)

# Okabe and Ito's colours, told apart by colour-blind eyes too; then matplotlib's own.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
NOTE = "Line: mean. Band: lowest to highest seed."


@dataclass(frozen=True)
class Line:
    """A curve with its place in the legend; ``reference`` is drawn dashed in the same colour."""

    label: str
    colour: str
    curve: Curve
    reference: Curve | None


@dataclass(frozen=True)
class Picture:
    """A panel with what is in it. ``labelled``: its lines are columns, so it needs a legend."""

    title: str
    unit: str
    lines: list[Line]
    labelled: bool


def arrange(groups: Sequence[Group], panels: Sequence[Panel] = PANELS) -> list[Picture]:
    """What to draw. Several columns share a panel for one group and get one each for several.

    Raises SaltireError if no panel has a column that a run has logged.
    """
    pictures = []
    for panel in panels:
        columns = _matching(groups, panel.columns)
        apart = [[column] for column in columns] if len(groups) > 1 else [columns]
        for some in apart:
            lines = []
            for g, group in enumerate(groups):
                for c, column in enumerate(some):
                    curve = group.curve(column)
                    if curve is None or (
                        panel.idle is not None and set(curve.mean) == {panel.idle}
                    ):
                        continue
                    place = c if len(groups) == 1 else g
                    label = _short(some)[c] if len(groups) == 1 else group.name
                    reference = group.curve(panel.reference) if panel.reference else None
                    lines.append(Line(label, COLOURS[place % len(COLOURS)], curve, reference))
            if lines:
                title = panel.title if len(columns) == len(some) else f"{panel.title}: {some[0]}"
                pictures.append(Picture(_named(title, groups), panel.unit, lines, len(some) > 1))
    if not pictures:
        raise SaltireError(
            "these runs have logged nothing that is drawn here; name columns of theirs with "
            f"--columns: {', '.join(_matching(groups, ('*',)))}."
        )
    return pictures


def draw_png(groups: Sequence[Group], pictures: Sequence[Picture], path: str | Path) -> None:
    """Draw everything into a PNG (whole or not at all); MissingExtraError without matplotlib."""
    with replacing_file(path) as temporary:
        temporary.write_bytes(_image(groups, pictures, "png"))


def write_page(
    groups: Sequence[Group], pictures: Sequence[Picture], title: str, path: str | Path
) -> None:
    """An HTML page with the curves as SVG and the last value of each; it loads nothing."""
    drawing = _image(groups, pictures, "svg").decode()
    drawing = drawing[drawing.index("<svg") :]
    runs = ", ".join(f"{group.name}: {len(group.runs)}" for group in groups)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2330; background: #fff }}
svg {{ width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.5rem 0 2rem }}
th, td {{ padding: 0.1rem 0.7rem; text-align: right; border-bottom: 1px solid #e4e7ee }}
th:first-child, td:first-child {{ text-align: left }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(NOTE)} Seeds: {html.escape(runs)}.</p>
{drawing}
<h2>Last step</h2>
{_table(pictures)}
</body></html>
"""
    with replacing_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _matching(groups: Sequence[Group], patterns: Sequence[str]) -> list[str]:
    logged = list(dict.fromkeys(column for group in groups for column in group.columns()))
    return [c for pattern in patterns for c in logged if fnmatchcase(c, pattern)]


def _short(columns: Sequence[str]) -> list[str]:
    """Columns without the parts that all begin or end with: of "dept/GAME/player 0/lambda" and the
    other player's, "player 0"; of "share draw" and the others, "draw"."""
    if len(columns) < 2:
        return list(columns)
    mark = "/" if all("/" in column for column in columns) else " "
    parts = [column.split(mark) for column in columns]
    for keep in (slice(1, None), slice(None, -1)):
        end = 0 if keep.start else -1
        while all(len(some) > 1 and some[end] == parts[0][end] for some in parts):
            parts = [some[keep] for some in parts]
    return [(", " if mark == "/" else mark).join(some) for some in parts]


def _named(title: str, groups: Sequence[Group]) -> str:
    """The actuator by its name, where all runs have the same."""
    if title != "actuator":
        return title
    names = set()
    for run in (run for group in groups for run in group.runs):
        entropy = run.settings.get("entropy")
        if isinstance(entropy, dict) and entropy.get("schedule"):
            names.add(entropy["actuator"]["name"])
    return f"actuator: {names.pop().replace('_', ' ')}" if len(names) == 1 else title


def _table(pictures: Sequence[Picture]) -> str:
    rows = []
    for picture in pictures:
        for line in picture.lines:
            curve = line.curve
            what = (
                picture.title if line.label in picture.title else f"{picture.title}, {line.label}"
            )
            span = f"{curve.low[-1]:.4g} to {curve.high[-1]:.4g}" if curve.seeds > 1 else ""
            rows.append(
                f"<tr><td>{html.escape(what)}</td><td>{curve.steps[-1]}</td>"
                f"<td>{curve.mean[-1]:.4g}</td><td>{span}</td></tr>"
            )
    head = "<tr><th></th><th>step</th><th>mean</th><th>seeds from to</th></tr>"
    return f"<table>{head}\n" + "\n".join(rows) + "</table>"


def _image(groups: Sequence[Group], pictures: Sequence[Picture], format: str) -> bytes:
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "drawing runs") from None
    across = min(3, len(pictures))
    down = -(-len(pictures) // across)
    # A fixed salt names the SVG's parts, so the same runs give the same bytes.
    with rc_context({"svg.hashsalt": "saltire", "font.size": 8}):
        figure = Figure(figsize=(3.5 * across, 2.5 * down + 0.4), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        grid: Any = figure.subplots(down, across, squeeze=False)
        cells = [axes for row in grid for axes in row]
        for axes, picture in zip(cells, pictures, strict=False):
            _draw(axes, picture)
        for place, axes in enumerate(cells):
            if place >= len(pictures):
                axes.set_axis_off()
            elif place + across >= len(pictures):  # nothing stands below it
                axes.set_xlabel("step")
        _legend(figure, groups, pictures)
        buffer = io.BytesIO()
        figure.savefig(buffer, format=format, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()


def _draw(axes: Any, picture: Picture) -> None:
    for line in picture.lines:
        curve = line.curve
        dots = {"marker": "o", "markersize": 3} if len(curve.steps) <= 25 else {}
        axes.plot(curve.steps, curve.mean, color=line.colour, lw=1.4, label=line.label, **dots)
        if curve.seeds > 1:
            axes.fill_between(
                curve.steps, curve.low, curve.high, color=line.colour, alpha=0.18, lw=0
            )
            if len(curve.steps) == 1:
                axes.vlines(curve.steps, curve.low, curve.high, color=line.colour, lw=1.0)
        if line.reference is not None:
            target = line.reference
            axes.plot(target.steps, target.mean, color=line.colour, lw=1.0, ls=(0, (4, 2)))
    axes.set_title(picture.title, loc="left", fontsize=9)
    axes.set_ylabel(picture.unit)
    axes.grid(color="#e4e7ee", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", useOffset=False)
    if picture.labelled:
        axes.legend(frameon=False, fontsize=7, handlelength=1.2)


def _legend(figure: Any, groups: Sequence[Group], pictures: Sequence[Picture]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    if len(groups) > 1:
        handles = [
            Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=1.6, label=group.name)
            for i, group in enumerate(groups)
        ]
    if any(line.reference is not None for picture in pictures for line in picture.lines):
        handles.append(Line2D([], [], color="#5b6472", lw=1.0, ls=(0, (4, 2)), label="target"))
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False)
    if any(line.curve.seeds > 1 for picture in pictures for line in picture.lines):
        figure.supxlabel(NOTE, fontsize=7, color="#5b6472")
