"""A page on how a model was quantised: flatness, error and the largest channels of every layer."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from saltire.errors import SaltireError
from saltire.files import replacing_file
from saltire.quant.observe import BlockView, LinearView, MatrixView, Views
from saltire.report.matrix_pictures import flatness_over_depth, strip, surfaces

SURFACES = 3  # linears that are drawn large

STYLE = """
:root { --ink: #1d2430; --soft: #5d6878; --line: #e2e6ed; --before: #c2410c; --after: #0f766e;
  --paper: #fff; --tint: #f6f7fa }
* { box-sizing: border-box }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif }
main { max-width: 76rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem }
h1 { font-size: 1.9rem; letter-spacing: -0.02em; margin: 0 0 0.2rem }
h2 { font-size: 1.25rem; margin: 3rem 0 0.4rem; letter-spacing: -0.01em }
p { max-width: 46rem; color: var(--soft); margin: 0.2rem 0 1rem }
.facts { color: var(--soft); margin-bottom: 1.6rem }
.facts b { color: var(--ink); font-weight: 600 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 0.9rem }
.tile { background: var(--tint); border: 1px solid var(--line); border-radius: 10px;
  padding: 0.9rem 1.1rem }
.tile span { display: block; color: var(--soft); font-size: 0.82rem }
.tile b { font-size: 1.5rem; font-weight: 650; font-variant-numeric: tabular-nums }
.tile i { color: var(--soft); font-style: normal; font-size: 0.95rem }
img { max-width: 100%; height: auto; display: block }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 0.84rem }
thead th { position: sticky; top: 0; background: var(--paper); border-bottom: 2px solid var(--line);
  font-weight: 600; padding: 0.35rem 0.6rem; text-align: right; vertical-align: bottom }
td { padding: 0.16rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap }
th:first-child, td:first-child, td.name { text-align: left }
td.first { border-top: 2px solid #cdd4de }
.was { color: var(--before) } .now { color: var(--after); font-weight: 600 }
.bar { display: inline-block; height: 0.6em; background: var(--before); opacity: 0.55;
  border-radius: 2px; margin-left: 0.5em }
details { border: 1px solid var(--line); border-radius: 10px; margin: 0.6rem 0; padding: 0 1rem }
details[open] { padding-bottom: 1rem }
summary { cursor: pointer; padding: 0.6rem 0; font-weight: 600 }
summary span { color: var(--soft); font-weight: 400; margin-left: 0.7em }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #9aa5b5; --line: #2c3442; --before: #fb923c; --after: #2dd4bf;
    --paper: #12161d; --tint: #1a202a }
  img { background: #fff; border-radius: 8px; padding: 0.4rem } td.first { border-color: #3b4556 }
}
"""


def write_report(views: Views, title: str, facts: Mapping[str, str], path: str | Path) -> None:
    """An HTML page that loads nothing from anywhere (whole or not at all).

    facts: what stands under the title, such as recipe and size. Raises MissingExtraError without
    matplotlib, SaltireError without a view.
    """
    if not views.linears:
        raise SaltireError("no layer was quantised in this run, so there is nothing to report.")
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _facts(facts),
        _tiles(views),
        "<h2>Flatness over depth</h2>",
        "<p>How evenly magnitude is spread, as the mean of p&nbsp;ln&nbsp;p with p the square over "
        "the mean magnitudes of its row and column: 0 for constant magnitude, 1.86 for a Gaussian, "
        "more with outliers. Before, a matrix is as the model has it; after, as the kernels round "
        "it.</p>",
        _image(flatness_over_depth(views), "flatness and error over depth"),
        "<h2>Where it mattered most</h2>",
        "<p>The activations with the loudest channels, and the weights that meet them. Height is "
        "magnitude over the root mean square, on one scale before and after.</p>",
        *(
            _image(surfaces(view), f"block {view.block}, {view.name}")
            for view in _loudest(views.linears)
        ),
        "<h2>Every layer</h2>",
        _table(views.linears),
        "<h2>Block by block</h2>",
        "<p>Each picture is a whole matrix; a cell shows its largest magnitude over the root mean "
        "square. Columns are channels; rows are outputs of weights, tokens of activations.</p>",
        *(_block(block, views.linears) for block in views.blocks),
    ]
    body = "\n".join(parts)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>\n{body}\n</main></body></html>\n"
    )
    with replacing_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _loudest(linears: Sequence[LinearView]) -> list[LinearView]:
    """One linear of each shared input, the loudest first."""
    chosen: list[LinearView] = []
    for view in sorted(linears, key=lambda v: -v.activation[0].channels[0][1]):
        if all(view.activation[0].entropy != other.activation[0].entropy for other in chosen):
            chosen.append(view)
    return chosen[:SURFACES]


def _facts(facts: Mapping[str, str]) -> str:
    texts = (f"{html.escape(name)} <b>{html.escape(value)}</b>" for name, value in facts.items())
    return f'<div class="facts">{" &nbsp;·&nbsp; ".join(texts)}</div>'


def _tiles(views: Views) -> str:
    def change(title: str, pairs: list[tuple[MatrixView, MatrixView]]) -> str:
        was, now = (_median(pair[side].meanabs for pair in pairs) for side in (0, 1))
        return _tile(title, f"{_number(was, 2)} → {_number(now, 2)}", "median flatness")

    loud = [max(view.activation[side].channels[0][1] for view in views.linears) for side in (0, 1)]
    return (
        '<div class="tiles">'
        + change("Activations", [view.activation for view in views.linears])
        + change("Weights", [view.weight for view in views.linears])
        + _tile("Loudest channel", f"{loud[0]:.1f} → {loud[1]:.1f}", "times the mean square root")
        + _tile(
            "What a block adds",
            _number(_median(b.error for b in views.blocks), 3),
            "median relative error",
        )
        + "</div>"
    )


def _tile(title: str, value: str, unit: str) -> str:
    return f'<div class="tile"><span>{title}</span><b>{value}</b> <i>{unit}</i></div>'


def _image(png: str, text: str) -> str:
    return f'<img src="data:image/png;base64,{png}" alt="{html.escape(text)}">'


def _table(linears: Sequence[LinearView]) -> str:
    most = max(view.error for view in linears) or 1.0
    head = (
        "<tr><th>block</th><th style='text-align:left'>linear</th><th>bits</th>"
        "<th>activations<br>mean abs</th><th>activations<br>entropy</th>"
        "<th>weights<br>mean abs</th><th>weights<br>entropy</th>"
        "<th>loudest channel<br>before</th><th>after</th><th>output error</th></tr>"
    )
    rows, last = [], -1
    for view in linears:
        first = " first" if view.block != last else ""
        label = str(view.block) if view.block != last else ""
        last = view.block
        bits = f"W{view.weight_bits}A{view.act_bits}" if view.weight_bits else "–"
        cells = [
            label,
            f"{html.escape(view.name.rpartition('.')[2])}",
            bits,
            *(
                _pair(getattr(pair[0], kind), getattr(pair[1], kind))
                for pair in (view.activation, view.weight)
                for kind in ("meanabs", "entropy")
            ),
            *(f"{seen.channels[0][0]}: {seen.channels[0][1]:.1f}×" for seen in view.activation),
            f"{view.error:.3f}"
            f'<span class="bar" style="width:{5 * view.error / most:.2f}em"></span>',
        ]
        rows.append(
            "<tr>"
            + "".join(
                f'<td class="{"name" if n == 1 else "value"}{first}">{cell}</td>'
                for n, cell in enumerate(cells)
            )
            + "</tr>"
        )
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _pair(was: float, now: float) -> str:
    before, after = _number(was, 2), _number(now, 2)
    return f'<span class="was">{before}</span> → <span class="now">{after}</span>'


def _number(value: float, digits: int) -> str:
    """A layer of zeros has no flatness: NaN is written as n/a."""
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def _median(values: Iterable[float]) -> float:
    """Of those that are numbers; NaN if none is."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def _block(block: BlockView, linears: Sequence[LinearView]) -> str:
    mine = [view for view in linears if view.block == block.block]
    channels = "; ".join(
        f"{html.escape(view.name.rpartition('.')[2])} "
        + ", ".join(f"{channel}: {value:.1f}×" for channel, value in view.activation[0].channels)
        for view in mine
        if view.name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj"))
    )
    return (
        f"<details><summary>Block {block.block}<span>error of what it adds "
        f"{_number(block.error, 3)}</span></summary>{_image(strip(mine), f'block {block.block}')}"
        f"<p>Loudest channels before: {channels}</p></details>"
    )
