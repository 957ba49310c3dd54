"""BDQ against its peers' transforms on the default model: perplexity gaps on the same text.

Every recipe is calibrated on the same windows of WikiText-2 valid, rounded by the same GPTQ, and
measured on WikiText-2 test; gap = perplexity - perplexity of fp32. Keys of the last line (means
over seeds; the CSV has each): w4a4_gap_vs_kronecker (<= 0.55), w4a4_gap_vs_hadamard (<= 0.3),
w4a4_ppl_ratio (<= 1.22), kronecker_ppl_ratio (<= 1.578, FlatQuant's own), w2a4_gap_vs_kronecker
(<= 0.61; groups of 64), w4a8_ppl_ratio (<= 1.08), w4a4kv4_over_w4a4 (<= 1.03), normal_seconds
(<= 2,400), fast_seconds (<= 180), normal_peak_mb (<= 1,500, beyond the loaded model). The full run
uses three seeds, the whole file at a context of 2,048, and adds the ablations; it takes hours.
``--anchors``: one seed, as much text as FlatQuant's own code had when it gave 36.07 against 22.86
in fp32 (of windows that are not known: docs/bdq.md). ``--quick``: one seed, less text, fewer steps,
the same method; ``--only`` finds the ablations too. Without --data (or SALTIRE_DATA) the embedded
texts take WikiText-2's place.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from harness import Report
from torch import Tensor

from saltire.models.loading import load_model
from saltire.quant import RECIPES, Recipe, quantize
from saltire.quant.evaluate import perplexity
from saltire.quant.recipe import Learning
from saltire.quant.texts import calibration_tokens, evaluation_tokens


@dataclass(frozen=True)
class Size:
    """How much text and how many steps: what ``--quick`` makes smaller."""

    seeds: int
    samples: int
    length: int
    windows: int
    context: int
    group_steps: int
    epochs: int


FULL = Size(3, 64, 1024, 10**6, 2048, 100, 2)
QUICK = Size(1, 4, 1024, 4, 1024, 20, 2)
ANCHORS = Size(1, 8, 1024, 12, 1024, 100, 4)  # as much text as FlatQuant's own code had


def headline(size: Size) -> Iterator[tuple[str, Recipe]]:
    """Name -> recipe of everything that the keys compare. Heads stay as they are, in all alike."""
    end_to_end = Learning(epochs=size.epochs)
    by_groups = Learning(group_steps=size.group_steps)
    for name in ("w4a4", "w2a4-g64"):
        base = replace(RECIPES[name], head_bits=16)
        yield f"{name} kronecker", replace(base, transform="kronecker", learning=by_groups)
        yield f"{name} bdq normal", replace(base, learning=end_to_end)
    base = replace(RECIPES["w4a4"], head_bits=16)
    yield "w4a4 hadamard", replace(base, transform="hadamard")
    yield "w4a4 bdq fast", base
    yield "w4a8 bdq fast", replace(RECIPES["w4a8"], head_bits=16)
    yield "w4a4kv4 bdq normal", replace(base, kv_bits=4, learning=end_to_end)


def ablations(size: Size) -> Iterator[tuple[str, Recipe]]:
    """W4A4 with one part less, or another loss; and the peer with BDQ's last step."""
    base = replace(RECIPES["w4a4"], head_bits=16)
    learning = Learning(epochs=size.epochs)
    learned = replace(base, learning=learning)
    both = replace(learning, group_steps=size.group_steps)
    yield "values not turned", replace(learned, turn=False)
    yield "no input diagonal", replace(learned, transform="hadamard")
    yield "no rotation", replace(learned, rotation="none")
    yield "Hadamard of 64", replace(learned, rotation="block")
    yield "no clip", replace(learned, clip=False)
    yield "transform learned too", replace(learned, learning=both)
    yield "RCE", replace(learned, learning=replace(learning, loss="rce"))
    yield "RCE as printed", replace(learned, learning=replace(learning, loss="rce-printed"))
    yield "MSE of logits", replace(learned, learning=replace(learning, loss="mse"))
    yield "kronecker, end to end", replace(base, transform="kronecker", learning=both)
    yield "w2a4 per channel", replace(RECIPES["w2a4"], head_bits=16, learning=learning)


@dataclass(frozen=True)
class Outcome:
    """megabytes: the most that quantising took beyond the loaded model, files mapped included."""

    ppl: float
    seconds: float
    megabytes: float


def measure(recipe: Recipe, calibration: Tensor, test: Tensor, seed: int) -> Outcome:
    """The default model under a recipe."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the case before left behind goes back to the system
    model, tokenizer = load_model()
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
    loaded, start = resident("VmRSS"), time.perf_counter()
    quantize(model, tokenizer, recipe, calibration, seed=seed)
    seconds, peak = time.perf_counter() - start, resident("VmHWM")
    return Outcome(perplexity(model, test).value, seconds, peak - loaded)


def resident(what: str) -> float:
    """Megabytes of this process in memory, VmRSS now or VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("SALTIRE_DATA"), help="folder of data")
    parser.add_argument("--quick", action="store_true", help="less text and fewer steps")
    parser.add_argument("--anchors", action="store_true", help="one seed, the anchors' text")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, help="how many seeds, in place of the size's")
    parser.add_argument("--windows", type=int, help="windows of the test, in place of the size's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="only cases whose name holds one of these")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else ANCHORS if options.anchors else FULL
    size = replace(size, seeds=options.seeds or size.seeds, windows=options.windows or size.windows)
    folder = Path(options.data) / "wikitext-2" if options.data else None
    report = Report("quantization", options.quick)

    original, tokenizer = load_model()
    test = evaluation_tokens(
        str(folder / "test.txt") if folder else "pydoc",
        tokenizer,
        windows=size.windows,
        length=size.context,
    )
    fp32 = perplexity(original, test).value
    whole = options.only or not options.quick
    cases = [*headline(size), *(ablations(size) if whole else [])]
    wanted = options.only.split(",")
    found: dict[str, list[Outcome]] = {}
    for seed in range(options.seed, options.seed + size.seeds):
        calibration = calibration_tokens(
            str(folder / "valid.txt") if folder else "self",
            original,
            tokenizer,
            samples=size.samples,
            length=size.length,
            seed=seed,
        )
        for name, recipe in cases:
            if not any(part in name for part in wanted):
                continue
            got = measure(recipe, calibration, test, seed)
            found.setdefault(name, []).append(got)
            row = {"case": name, "variant": f"seed {seed}", "ppl": round(got.ppl, 3)}
            row |= {"over_fp32": round(got.ppl / fp32, 4), "quantise_s": round(got.seconds, 1)}
            row |= {"samples": len(calibration), "windows": len(test), "context": test.shape[1]}
            row |= {"peak_mb": round(got.megabytes)}
            report.rows.append(row)
            print(*(f"{key} {value}" for key, value in row.items()), sep="  ", flush=True)
    keys(report, fp32, found)
    report.keys["text"] = "wikitext-2" if folder else "embedded"
    report.finish()


def keys(report: Report, fp32: float, outcomes: dict[str, list[Outcome]]) -> None:
    """The figures of the last line, of those cases that were run."""
    found = {name: [one.ppl for one in all_seeds] for name, all_seeds in outcomes.items()}
    normal, fast = (outcomes.get(f"w4a4 bdq {effort}", []) for effort in ("normal", "fast"))

    def gaps(above: str, below: str) -> list[float]:
        if above not in found or below not in found:
            return []
        pairs = zip(found[above], found[below], strict=True)
        return [(a - fp32) / (b - fp32) for a, b in pairs]

    def ratios(above: str, below: str | None = None) -> list[float]:
        if above not in found or (below is not None and below not in found):
            return []
        base = found[below] if below is not None else [fp32] * len(found[above])
        return [a / b for a, b in zip(found[above], base, strict=True)]

    figures = {
        "w4a4_gap_vs_kronecker": gaps("w4a4 bdq normal", "w4a4 kronecker"),
        "w4a4_gap_vs_hadamard": gaps("w4a4 bdq normal", "w4a4 hadamard"),
        "w2a4_gap_vs_kronecker": gaps("w2a4-g64 bdq normal", "w2a4-g64 kronecker"),
        "w4a4_ppl_ratio": ratios("w4a4 bdq normal"),
        "w4a4_fast_ppl_ratio": ratios("w4a4 bdq fast"),
        "kronecker_ppl_ratio": ratios("w4a4 kronecker"),
        "w4a8_ppl_ratio": ratios("w4a8 bdq fast"),
        "w4a4kv4_over_w4a4": ratios("w4a4kv4 bdq normal", "w4a4 bdq normal"),
        "normal_seconds": [one.seconds for one in normal],
        "fast_seconds": [one.seconds for one in fast],
        "normal_peak_mb": [one.megabytes for one in normal],
    }
    report.key("ppl_fp32", fp32)
    for name, values in figures.items():
        if values:
            report.key(name, statistics.mean(values))
            if len(values) > 1:
                report.key(f"{name}_spread", max(values) - min(values))


if __name__ == "__main__":
    main()
