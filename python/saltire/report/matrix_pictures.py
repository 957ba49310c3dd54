"""Pictures of matrices before and after they are quantised, as base64 PNGs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from saltire.errors import MissingExtraError
from saltire.quant.observe import LinearView, MatrixView, Views

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE, AFTER, SOFT = "#c2410c", "#0f766e", "#5d6878"
GROUPS = {
    "q, k, v": "q_proj",
    "o": "o_proj",
    "gate, up": "gate_proj",
    "down": "down_proj",
}


def flatness_over_depth(views: Views) -> str:
    """Flatness of what enters each kind of linear over the blocks, and the error of the blocks."""
    figure = _figure(12.0, 2.9)
    axes: Any = figure.subplots(1, 5)
    for place, (title, name) in enumerate(GROUPS.items()):
        mine = [view for view in views.linears if view.name.endswith(name)]
        for side, colour, label in ((0, BEFORE, "before"), (1, AFTER, "after")):
            values = [view.activation[side].meanabs for view in mine]
            axes[place].plot([v.block for v in mine], values, color=colour, lw=1.6, label=label)
        axes[place].axhline(1.856, color=SOFT, lw=0.8, ls=":")
        axes[place].set_yscale("log")
        axes[place].set_title(f"into {title}", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("flatness (mean abs)", fontsize=8)
    blocks = views.blocks
    axes[4].bar([b.block for b in blocks], [b.error for b in blocks], color="#64748b", width=0.75)
    axes[4].set_title("error of what a block adds", fontsize=10)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.set_xlabel("block", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e2e6ed", lw=0.7)
        axis.set_axisbelow(True)
    return _png(figure)


def surfaces(view: LinearView) -> str:
    """Activations and weights of one linear as four surfaces."""
    figure = _figure(12.0, 3.5)
    for place, (pair, kind, depth) in enumerate(
        ((view.activation, "activations", "token"), (view.weight, "weights", "output"))
    ):
        top = max(float(seen.cells.max()) for seen in pair) or 1.0
        for side, word in ((0, "before"), (1, "after")):
            axes: Any = figure.add_subplot(1, 4, 2 * place + side + 1, projection="3d")
            _surface(axes, pair[side], top)
            axes.set_title(f"{kind} {word}", fontsize=10, y=1.0)
            axes.set_xlabel("channel", fontsize=7, labelpad=-10)
            axes.set_ylabel(depth, fontsize=7, labelpad=-10)
    name = view.name.rpartition(".")[2]
    figure.suptitle(f"block {view.block}, {name}", fontsize=11, x=0.01, ha="left", weight="bold")
    return _png(figure)


def strip(views: Sequence[LinearView]) -> str:
    """The matrices of a block's linears as heat maps: activations and weights, before and after."""
    figure = _figure(12.0, 6.6)
    grid: Any = figure.subplots(4, len(views), squeeze=False)
    rows = ("activations\nbefore", "activations\nafter", "weights\nbefore", "weights\nafter")
    for column, view in enumerate(views):
        seen = (*view.activation, *view.weight)
        for row, each in enumerate(seen):
            pair = view.activation if row < 2 else view.weight
            axes = grid[row][column]
            # The square root shows what is small beside an outlier.
            image = axes.imshow(
                each.cells.sqrt().numpy(),
                aspect="auto",
                interpolation="nearest",
                cmap="magma",
                vmin=0.0,
                vmax=float(max(p.cells.max() for p in pair)) ** 0.5,
            )
            axes.set_xticks([])
            axes.set_yticks([])
            if row == 0:
                axes.set_title(view.name.rpartition(".")[2], fontsize=9)
            if column == 0:
                axes.set_ylabel(rows[row], fontsize=8)
            peak = float(each.cells.max())
            axes.set_xlabel(f"peak {peak:.1f}", fontsize=7, labelpad=2)
            image.set_rasterized(True)
    return _png(figure, dpi=90)


def _surface(axes: Any, seen: MatrixView, top: float) -> None:
    rows, columns = seen.cells.shape
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    axes.plot_surface(
        x.numpy(),
        y.numpy(),
        seen.cells.numpy(),
        cmap="viridis",
        vmin=0.0,
        vmax=top * 0.7,
        rstride=1,
        cstride=1,
        linewidth=0.0,
        antialiased=False,
    )
    axes.set_zlim(0.0, top)
    axes.view_init(elev=28, azim=-58)
    axes.set_box_aspect((1.25, 1.0, 0.75), zoom=1.15)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(axis="z", labelsize=7, pad=-2)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.pane.set_facecolor("#f6f7fa")
        axis.pane.set_edgecolor("#e2e6ed")
    axes.grid(False)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "drawing a report") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure, dpi: int = 130) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return base64.b64encode(buffer.getvalue()).decode()
