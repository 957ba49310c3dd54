"""``saltire quantize MODEL OUT``: make a low-bit checkpoint."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from saltire.cli import _console

if TYPE_CHECKING:
    from saltire.quant.observe import Views


def register(app: typer.Typer) -> None:
    app.command("quantize")(quantize)


def quantize(
    model: str = typer.Argument(..., help="default, a directory, a .gguf file or a hub name"),
    out: Path = typer.Argument(..., help="directory of the new checkpoint"),
    recipe: str = typer.Option("w4a4", help="a name (an unknown one lists all) or a .yaml file"),
    effort: str = typer.Option(
        "", help="fast: closed forms (the default); normal, best: also learn, for longer"
    ),
    transform: str = typer.Option(
        "", help="none, smooth, hadamard, kronecker or bdq in place of the recipe's"
    ),
    calibration: str = typer.Option("self", help="self, a .txt or .jsonl file, or a data set"),
    samples: int | None = typer.Option(
        None, help="calibration samples; default: 16, 128 with effort normal, 256 with best"
    ),
    length: int = typer.Option(512, help="tokens in one sample"),
    seed: int = typer.Option(0, help="seed of the calibration text"),
    kv_bits: int | None = typer.Option(
        None, help="bits of keys and values: 16, 8, 4 or 2; default: the recipe's"
    ),
    head_bits: int | None = typer.Option(
        None, help="bits of the head that gives the logits: 16, 8 or 4; default: the recipe's, 4"
    ),
    embedding_bits: int | None = typer.Option(
        None, help="bits of the embedding: 16, 8 or 4; default: the recipe's, 8"
    ),
    bits_per_weight: float = typer.Option(
        0.0, help="deal out 2, 4 and 8 bits to the layers, so many on average (scales counted)"
    ),
    budget_mb: float = typer.Option(0.0, help="the same, for so many MB of weights in all"),
    report: bool = typer.Option(
        False,
        "--report",
        help="write OUT/report.html: flatness, error, pictures of every layer",
    ),
    stream: bool = typer.Option(
        False, "--stream", help="read and write block by block: memory for one block is enough"
    ),
    resume: bool = typer.Option(
        False,
        "--resume",
        help="go on with a run that was killed; what it finished is in OUT.partial",
    ),
    json: bool = _console.JSON_OPTION,
) -> None:
    """Quantise MODEL and write packed integers to OUT (whole or not at all)."""
    from saltire import processes
    from saltire.quant.job import Job, run
    from saltire.quant.lowrank.compress import kept_whole
    from saltire.quant.observe import Views
    from saltire.quant.recipes import EFFORTS, parse_recipe, with_effort, with_transform

    chosen = parse_recipe(recipe)
    if transform:
        chosen = with_transform(chosen, transform)
    if effort:
        chosen = with_effort(chosen, effort)
    if samples is None:
        samples = EFFORTS[effort or "fast"].samples
    if kv_bits is not None:
        chosen = replace(chosen, kv_bits=kv_bits)
    if head_bits is not None:
        chosen = replace(chosen, head_bits=head_bits)
    if embedding_bits is not None:
        chosen = replace(chosen, embedding_bits=embedding_bits)
    if bits_per_weight or budget_mb:
        chosen = replace(chosen, bits_per_weight=bits_per_weight, budget_mb=budget_mb)
    processes.start_if_launched()
    start = time.perf_counter()
    job = Job(
        model,
        out,
        chosen,
        calibration,
        samples=samples,
        length=length,
        seed=seed,
        stream=stream,
        resume=resume,
    )
    views = Views() if report else None
    with _console.warnings_as_notes():
        size = run(job, views)
    if processes.rank() != 0:
        return
    if views is not None:
        about = {
            "recipe": chosen.name,
            "weights": f"{size / 1e6:.1f} MB",
            "calibrated on": f"{samples} × {length} tokens of {calibration}",
        }
        _report(views, f"{model}, quantised to {chosen.name}", about, out / "report.html")
    facts = {
        "model": model,
        "recipe": chosen.name,
        "out": str(out),
        "megabytes": round(size / 1e6, 1),
        "seconds": round(time.perf_counter() - start, 1),
        # Linux counts kilobytes of 1,024 bytes.
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }
    if chosen.low_rank is not None and chosen.low_rank.kind == "factored":
        facts["low_rank"] = kept_whole(out)
    if json:
        _console.print_json(facts)
        return
    _console.out.print(
        f"{facts['recipe']} checkpoint of {facts['megabytes']} MB in {out} "
        f"after {facts['seconds']} s, at most {facts['peak_rss_mb']} MB of memory"
    )
    if "low_rank" in facts:
        _console.out.print(facts["low_rank"])


def _report(views: Views, title: str, about: dict[str, str], path: Path) -> None:
    """Write the report; say what it lacks where the run went on from an earlier one."""
    from saltire.report.quantisation import write_report

    if not views.blocks:
        note = "no report: an earlier run finished every block, and a report has to see them before"
    else:
        write_report(views, title, about, path)
        first = views.blocks[0].block
        note = f"the report begins with block {first}; an earlier run finished those before"
        if first == 0:
            return
    _console.note(f"{note}.")
