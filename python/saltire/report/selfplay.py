"""Pictures of a self-play run, drawn from what its log holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saltire.errors import MissingExtraError, SaltireError
from saltire.files import replacing_file

Records = Sequence[Mapping[str, Any]]


def is_selfplay(records: Records) -> bool:
    """Whether a log is of self-play."""
    return bool(records) and "match_entropy" in records[0]


def plot_selfplay(records: Records, path: Path) -> None:
    """Draw how matches ended, their entropy, and what the advantages were made of, as a PNG.

    records: of ``log.jsonl``. DEPT's panels (baselines, divergence, lambda) are drawn where the log
    has them. Raises SaltireError for a log that is not of self-play.
    """
    if not is_selfplay(records):
        raise SaltireError("the log is not of self-play: it has no match_entropy.")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "drawing self-play") from None
    names = list(dict.fromkeys(name for record in records for name in record))
    panels: list[tuple[str, dict[str, str]]] = [
        ("share of matches", _labelled(names, "share ")),
        ("match entropy / log K", {"match_entropy": "all matches"}),
        ("mean reward", {"reward": "learner", "win_rate": "win rate, evaluated"}),
        ("forfeits, share", {"forfeits": "forfeits"}),
        ("entropy of tokens, nats", {"entropy": "measured", "target": "target"}),
        ("gradient norm", {"grad_norm": "before clipping"}),
        ("baselines", _of_roles(names, ("fast", "slow"))),
        ("divergence |fast − slow|", _of_roles(names, ("divergence",))),
        ("λ", _of_roles(names, ("lambda",))),
    ]
    drawn = [
        (title, {n: label for n, label in lines.items() if n in names}) for title, lines in panels
    ]
    drawn = [(title, lines) for title, lines in drawn if lines]
    rows = -(-len(drawn) // 3)
    figure, axes = pyplot.subplots(
        rows, 3, figsize=(12, 2.8 * rows), layout="constrained", squeeze=False
    )
    for axis, (title, lines) in zip(axes.flat, drawn, strict=False):
        for name, label in lines.items():
            points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
            style = "--" if label.endswith("slow") or name == "target" else "-"
            axis.plot(*zip(*points, strict=True), style, label=label, linewidth=1.4)
        axis.set(xlabel="step", title=title)
        if title == "gradient norm" and all(r.get("grad_norm", 0) > 0 for r in records):
            axis.set_yscale("log")
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    for axis in list(axes.flat)[len(drawn) :]:
        axis.axis("off")
    with replacing_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    pyplot.close(figure)


def _labelled(names: Sequence[str], start: str) -> dict[str, str]:
    return {name: name.removeprefix(start) for name in names if name.startswith(start)}


def _of_roles(names: Sequence[str], what: Sequence[str]) -> dict[str, str]:
    """Columns ``dept/GAME/ROLE/WHAT`` with the label ``ROLE, WHAT``."""
    found = {}
    for name in names:
        parts = name.split("/")
        if parts[0] == "dept" and len(parts) == 4 and parts[3] in what:
            found[name] = parts[2] if len(what) == 1 else f"{parts[2]}, {parts[3]}"
    return found
