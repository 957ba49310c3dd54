"""One page on a run of ``saltire synth``: histograms, a drawn dependency graph, a sample."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saltire.files import replacing_file
from saltire.synth.write import read_shard

SHOWN = 1200  # characters of a document of the sample that are printed
COLOURS = ("#e8f1fa", "#fdf0e3")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222 }
table { border-collapse: collapse } td { padding: .15rem .8rem .15rem 0 }
td + td { text-align: right; font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #555 }
.document { padding: .6rem .9rem; white-space: pre-wrap; overflow-wrap: anywhere }
.document b { display: block; font: 12px ui-monospace, monospace; color: #666 }
figure { margin: 1.5rem 0 } figcaption { color: #555 }
"""


def write_page(out: Path) -> Path:
    """Write ``index.html`` into a finished run's folder; return its path. No script, no network."""
    stats = json.loads((out / "stats.json").read_text())
    manifest = json.loads((out / "manifest.json").read_text())
    sample = read_shard(out / manifest["files"][0]["name"])[0]
    target = manifest["config"]["target_tokens"]
    parts = [
        "<h1>Long samples from short documents</h1>",
        _table(stats, manifest["config"]),
        _figure(
            _histogram(stats["length_histogram"], 0, target),
            f"Tokens of the {stats['samples']} samples; the target is {target:,}.",
        ),
    ]
    if stats["edges"]:
        low, high = stats["gain_range"]
        parts += [
            _figure(
                _histogram(stats["gain_histogram"], low, high),
                f"Gains of the {stats['edges']:,} scored edges, in nats; the outermost bars hold "
                "what lies beyond.",
            ),
            _figure(
                _arcs(sample),
                "What the documents of the first sample give to one another: above the line to "
                "later documents, below it to earlier ones; width by nats, gains above 0 only.",
            ),
        ]
    parts += ["<h2>The first sample</h2>", _documents(sample)]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>saltire synth</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    path = out / "index.html"
    with replacing_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _table(stats: dict[str, Any], config: dict[str, Any]) -> str:
    rows = {
        "order": config["order"],
        "rows read": f"{stats['rows']:,}",
        "rows skipped": f"{sum(stats['skipped'].values()):,}",
        "exact and near duplicates dropped": (
            f"{stats['exact_duplicates']:,} + {stats['near_duplicates']:,}"
        ),
        "longer than the target": f"{stats['longer_than_target']:,}",
        "documents used": f"{stats['documents']:,}",
        "samples": f"{stats['samples']:,}",
        "tokens": f"{stats['tokens']:,}",
        "fill": f"{stats['fill']:.1%}",
        "samples ordered exactly": f"{stats['exactly_ordered']:,}",
        "value of the orders, nats": f"{stats['objective']:,.0f} of {stats['bound']:,.0f} at most",
        "mean gain of an edge, nats": f"{stats['mean_gain']:.2f}",
        "direction, signal to noise": f"{stats['direction_snr']:.2f}",
        "mean distance of a forward gain, tokens": f"{stats['mean_distance']:,.0f}",
        "forward gains over a quarter of the sample": f"{stats['far_share']:.1%}",
        "8-grams copied from an earlier document": f"{stats['copy_rate']:.2%}",
    }
    cells = (
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _histogram(counts: Sequence[int], low: float, high: float) -> str:
    width, height, top = 720, 180, max(1, *counts)
    step, head = width / len(counts), 18  # the number of the highest bar stands above all bars
    bars = "".join(
        f'<rect x="{k * step + 1:.1f}" y="{head + height - height * count / top:.1f}" '
        f'width="{step - 2:.1f}" height="{height * count / top:.1f}" fill="#3b7dd8">'
        f"<title>{count}</title></rect>"
        for k, count in enumerate(counts)
    )
    ticks = "".join(
        f'<text x="{x:.0f}" y="{head + height + 16}" text-anchor="{anchor}">{value:,.0f}</text>'
        for x, value, anchor in (
            (0, low, "start"),
            (width / 2, (low + high) / 2, "middle"),
            (width, high, "end"),
        )
    )
    k = max(range(len(counts)), key=lambda k: counts[k])
    x = min(max((k + 0.5) * step, 12), width - 12)
    label = f'<text x="{x:.0f}" y="12" text-anchor="middle">{top:,}</text>'
    axis = f'<path d="M0 {head + height}H{width}" stroke="#bbb"/>'
    size = f'viewBox="0 0 {width} {head + height + 22}" width="{width}"'
    return f"<svg {size}>{bars}{axis}{ticks}{label}</svg>"


def _arcs(sample: dict[str, Any]) -> str:
    n = len(sample["documents"])
    width, step = 720, 720 / max(n, 2)
    edges = [e for e in sample["edges"] if e["nats"] > 0]
    most = max((e["nats"] for e in edges), default=1.0)
    reach = max((abs(e["target"] - e["source"]) for e in edges), default=1)
    scale = min(312.0, reach * step / 2 + 12) / reach

    def highest(sign: int) -> float:
        spans = (sign * (e["target"] - e["source"]) for e in edges)
        return scale * max(0, *spans, 0) + 10

    height, depth = highest(1), highest(-1)
    shapes = []
    for edge in sorted(edges, key=lambda e: e["nats"]):
        a, b = ((edge[end] + 0.5) * step for end in ("source", "target"))
        rise = scale * abs(edge["target"] - edge["source"])
        forward = edge["target"] > edge["source"]
        peak = height - 2 * rise if forward else height + 2 * rise
        shapes.append(
            f'<path d="M{a:.1f} {height:.1f} Q{(a + b) / 2:.1f} {peak:.1f} {b:.1f} {height:.1f}" '
            f'fill="none" stroke="{"#3b7dd8" if forward else "#d8733b"}" '
            f'stroke-width="{0.5 + 3.5 * edge["nats"] / most:.2f}" opacity="0.6">'
            f"<title>{edge['source']} to {edge['target']}: {edge['nats']:.1f} ± {edge['std']:.1f} "
            "nats</title></path>"
        )
    shapes += [
        f'<circle cx="{(k + 0.5) * step:.1f}" cy="{height:.1f}" r="4" fill="#222">'
        f"<title>{k}: {name}</title></circle>"
        for k, name in enumerate(sample["documents"])
    ]
    size = f'viewBox="0 0 {width} {height + depth:.0f}" width="{width}"'
    return f"<svg {size}>{''.join(shapes)}</svg>"


def _documents(sample: dict[str, Any]) -> str:
    parts = []
    for k, name in enumerate(sample["documents"]):
        start, end = sample["starts"][k], sample["ends"][k]
        text = sample["text"][start:end]
        cut = f" … ({len(text) - SHOWN:,} more characters)" if len(text) > SHOWN else ""
        tokens = f"{sample['token_starts'][k]:,}-{sample['token_ends'][k]:,}"
        parts.append(
            f'<div class="document" style="background:{COLOURS[k % 2]}">'
            f"<b>{k} · {name} · tokens {tokens}</b>"
            f"{html.escape(text[:SHOWN])}{cut}</div>"
        )
    return "".join(parts)
