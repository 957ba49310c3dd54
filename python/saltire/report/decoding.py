"""Pictures of decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saltire.errors import MissingExtraError, SaltireError
from saltire.files import replacing_file

if TYPE_CHECKING:
    from saltire.decode import Plan


def plot_plans(plans: Sequence[Plan], path: Path) -> None:
    """Draw which layers each plan skipped, plan after plan, as a PNG."""
    if not plans:
        raise SaltireError("there are no plans to draw; generate with --draft clasp or auto.")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "drawing plans") from None
    units = np.array([plan.units.tolist() for plan in plans]).T  # [L, plans]: 0..3
    names = ["skipped", "attention only", "MLP only", "whole"]
    colours = ["#c23b22", "#e8a33d", "#7f9fc4", "#e9eef5"]
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axes.imshow(
        units, aspect="auto", interpolation="nearest", cmap=ListedColormap(colours), vmin=0, vmax=3
    )
    axes.set_xlabel("plan, in the order made")
    axes.set_ylabel("layer")
    axes.set_title("Layers that the draft leaves out, over time")
    seen = [i for i in range(4) if (units == i).any()]
    axes.legend(
        handles=[Patch(color=colours[i], label=names[i]) for i in seen],
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        frameon=False,
    )
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)
