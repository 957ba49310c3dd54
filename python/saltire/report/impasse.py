"""Pictures of self-play that gets stuck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from saltire.errors import MissingExtraError
from saltire.files import replacing_file
from saltire.rl.impasse_toys import WINDOW, ToyRun


def plot_toys(runs: Mapping[str, Sequence[ToyRun]], path: Path) -> None:
    """Draw the stuck outcome's share and the gradient's norm over steps, a line a seed, as a PNG.

    runs: of one toy, by the name of the advantages.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "drawing the impasse") from None
    figure, (shares, norms) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for number, (name, seeds) in enumerate(runs.items()):
        for seed, run in enumerate(seeds):
            label = name if seed == 0 else None
            y = run.stuck_share()
            x = [WINDOW * (i + 0.5) for i in range(len(y))]
            shares.plot(x, y, color=f"C{number}", alpha=0.8, label=label)
            mean = [
                sum(part) / len(part)
                for part in (run.norms[i : i + WINDOW] for i in range(0, len(run.norms), WINDOW))
            ]
            norms.semilogy(x, [max(m, 1e-8) for m in mean], color=f"C{number}", alpha=0.8)
    toy = next(iter(runs.values()))[0].toy
    shares.set(xlabel="step", ylabel=f"share of “{toy.stuck}”", ylim=(-0.03, 1.03))
    norms.set(xlabel="step", ylabel="norm of the gradient")
    figure.suptitle(toy.name)
    figure.legend(loc="outside lower center", ncols=len(runs), frameon=False)
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    pyplot.close(figure)
