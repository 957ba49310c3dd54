"""``saltire analyze MODEL``: how low rank and quantisation interact, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from saltire.cli import _console
from saltire.errors import SaltireError

if TYPE_CHECKING:
    from saltire.quant.lowrank.survey import Measured
    from saltire.report.heatmap import HeatMap


def register(app: typer.Typer) -> None:
    app.command("analyze")(analyze)


def analyze(
    model: str = typer.Argument("default", help="default, a directory, a .gguf file or a hub name"),
    out: Path = typer.Option(Path("interaction"), help="folder for the picture and the page"),
    recipe: str = typer.Option("w4a4", help="how weights and activations are rounded"),
    gauge: str = typer.Option("down", help="what stands between the factors; down: plain SVD"),
    text: str = typer.Option("pydoc", help="pydoc, a .txt or .jsonl file, or a data set"),
    samples: int = typer.Option(4, help="windows of text that the layers see"),
    length: int = typer.Option(512, help="tokens in one window"),
    every: int = typer.Option(5, help="measure every n-th block only; 1 for all of them"),
    shares: str = typer.Option("", help="ranks as shares of the full one, such as 0.25,0.5"),
    json: bool = _console.JSON_OPTION,
) -> None:
    """Measure the errors of truncation and of quantisation, alone and together, and draw them."""
    from saltire.models.loading import load_model
    from saltire.quant.lowrank.survey import SHARES, survey
    from saltire.quant.recipe import GAUGES
    from saltire.quant.recipes import parse_recipe
    from saltire.quant.texts import evaluation_tokens
    from saltire.report.heatmap import draw_png, write_page

    chosen = parse_recipe(recipe)
    if gauge not in GAUGES:
        raise SaltireError(f"gauge = {gauge!r}; expected one of {', '.join(GAUGES)}.")
    wanted = _shares(shares) if shares else SHARES
    loaded, tokenizer = load_model(model)
    tokens = evaluation_tokens(text, tokenizer, windows=samples, length=length)
    found = survey(loaded, tokens, chosen, gauge=gauge, shares=wanted, every=every)
    if not found:
        raise SaltireError("no layer has a rank that the kernels could run: all are too small.")
    maps, title = panels(found, wanted), f"{model}: low rank and {chosen.name}, gauge {gauge}"
    label = "rank / full rank"
    draw_png(maps, title, label, out / "interaction.png")
    write_page(maps, title, label, NOTES, out / "interaction.html")
    facts = summary(found)
    if json:
        rows = [{"layer": m.layer, "share": m.share, **vars(m.result)} for m in found]
        files = [str(out / f"interaction.{suffix}") for suffix in ("png", "html")]
        _console.print_json({"model": model, **facts, "files": files, "rows": rows})
        return
    _console.out.print(
        f"{len(found)} measurements; mean excess over e_L + e_Q: low rank first "
        f"{facts['excess_lq']:+.3f}, quantisation first {facts['excess_ql']:+.3f}; low rank first "
        f"is better in {facts['lq_better']:.0%}. Pictures in {out}"
    )


NOTES = (
    "All figures are shares of the norm of a layer's outputs. e_L: truncation alone; e_Q: "
    "quantising the whole weight and its input; together: with both, the low rank first.",
    "Excess: the error of both together, less e_L + e_Q. Red: more than the sum; blue: less.",
)


def panels(found: Sequence[Measured], shares: Sequence[float]) -> list[HeatMap]:
    """e_L, e_Q, both together, and the excess in either order: layers down, ranks across."""
    from saltire.report.heatmap import HeatMap

    at = {(m.layer, m.share): m.result for m in found}
    layers = list(dict.fromkeys(m.layer for m in found))
    columns = [f"{share:g}" for share in shares]

    def panel(title: str, attribute: str, diverging: bool = False) -> HeatMap:
        values = [[float(getattr(at[n, s], attribute)) for s in shares] for n in layers]
        return HeatMap(title, layers, columns, values, diverging)

    return [
        panel("e_L", "e_L"),
        panel("e_Q", "e_Q"),
        panel("together", "lq"),
        panel("excess, low rank first", "excess_lq", True),
        panel("excess, quantised first", "excess_ql", True),
    ]


def summary(found: Sequence[Measured]) -> dict[str, Any]:
    """Means over all measurements."""
    count = len(found)
    return {
        "measurements": count,
        "excess_lq": sum(m.result.excess_lq for m in found) / count,
        "excess_ql": sum(m.result.excess_ql for m in found) / count,
        "lq_better": sum(m.result.lq < m.result.ql for m in found) / count,
    }


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SaltireError(f"shares = {text!r}; expected numbers such as 0.25,0.5.") from None
