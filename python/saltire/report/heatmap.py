"""Heat maps of measurements over layers and ranks: a PNG, and a page that stands alone."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saltire.errors import MissingExtraError, SaltireError
from saltire.files import replacing_file


@dataclass(frozen=True)
class HeatMap:
    """One panel. values[row][column], NaN where there is none; diverging: zero has a colour of its
    own, so that the sign is seen."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    diverging: bool = False

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.values}
        if len(self.values) != len(self.rows) or widths - {len(self.columns)}:
            raise SaltireError(
                f"{self.title}: {len(self.values)} rows of {sorted(widths)} values; expected "
                f"{len(self.rows)} rows of {len(self.columns)}."
            )


def draw_png(maps: Sequence[HeatMap], title: str, column_label: str, path: str | Path) -> None:
    """Draw the maps side by side, one row of labels for all, into a PNG (whole or not at all).

    Raises MissingExtraError without matplotlib.
    """
    with replacing_file(path) as temporary:
        temporary.write_bytes(_png(maps, title, column_label))


def write_page(
    maps: Sequence[HeatMap], title: str, column_label: str, notes: Sequence[str], path: str | Path
) -> None:
    """An HTML page with the picture inside, the notes and every value as a table; it loads nothing
    from anywhere."""
    picture = base64.b64encode(_png(maps, title, column_label)).decode()
    tables = "\n".join(_table(each, column_label) for each in maps)
    paragraphs = "\n".join(f"<p>{html.escape(note)}</p>" for note in notes)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2330; background: #fff }}
img {{ width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 0.5rem 0 2rem }}
th, td {{ padding: 0.1rem 0.7rem; text-align: right; border-bottom: 1px solid #e4e7ee }}
th:first-child, td:first-child {{ text-align: left }}
</style></head><body>
<h1>{html.escape(title)}</h1>
{paragraphs}
<img src="data:image/png;base64,{picture}" alt="{html.escape(title)}">
{tables}
</body></html>
"""
    with replacing_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _table(each: HeatMap, column_label: str) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in each.columns)
    body = "\n".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{'' if math.isnan(v) else f'{v:.3f}'}</td>" for v in row)
        + "</tr>"
        for name, row in zip(each.rows, each.values, strict=True)
    )
    first = f"<tr><th>{html.escape(column_label)}</th>{head}</tr>"
    return f"<h2>{html.escape(each.title)}</h2>\n<table>{first}\n{body}</table>"


def _png(maps: Sequence[HeatMap], title: str, column_label: str) -> bytes:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "drawing a heat map") from None
    rows, columns = len(maps[0].rows), max(len(each.columns) for each in maps)
    height = max(3.0, 0.17 * rows + 1.6)
    figure = Figure(
        figsize=(2.0 + len(maps) * max(2.2, 0.42 * columns + 1.1), height),
        dpi=130,
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    all_axes: Any = figure.subplots(1, len(maps), squeeze=False, sharey=True)
    for index, (each, axes) in enumerate(zip(maps, all_axes[0], strict=True)):
        finite = [v for row in each.values for v in row if math.isfinite(v)]
        high = max((abs(v) for v in finite), default=1.0) or 1.0
        image = axes.imshow(
            each.values,
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r" if each.diverging else "viridis",
            vmin=-high if each.diverging else 0.0,
            vmax=high,
        )
        axes.set_title(each.title, fontsize=9)
        axes.set_xticks(range(len(each.columns)), each.columns, fontsize=7, rotation=60)
        axes.set_xlabel(column_label, fontsize=8)
        axes.set_facecolor("#eceff4")  # where there is no value
        if index == 0:
            axes.set_yticks(range(rows), each.rows, fontsize=6)
        figure.colorbar(image, ax=axes, shrink=0.7).ax.tick_params(labelsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
