"""The default model end to end: what W4A4 costs in perplexity and gives in prefill speed.

Keys of the last line: prefill_w4a4_vs_fp32 (>= 2.0; 512 tokens through transformers' forward,
interleaved, medians), ppl_ratio_w4a4 (<= 1.45; WikiText-2 test, 12 windows of 1,024 spread over the
file, calibrated on 8 x 1,024 tokens of WikiText-2 valid), peak_rss_mb (<= 2,500; while quantising,
in a process of its own). Without --data (or SALTIRE_DATA) the embedded texts take the place of
WikiText-2, and the line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from saltire.demo.stage import fresh_process
from saltire.models.loading import load_model
from saltire.quant.evaluate import perplexity
from saltire.quant.texts import evaluation_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("SALTIRE_DATA"), help="folder of data")
    parser.add_argument("--recipe", default="w4a4")
    parser.add_argument("--quick", action="store_true", help="fewer timings; the same method")
    options = parser.parse_args()
    folder = Path(options.data) / "wikitext-2" if options.data else None
    calibration = str(folder / "valid.txt") if folder else "self"
    test = str(folder / "test.txt") if folder else "pydoc"

    with tempfile.TemporaryDirectory() as temporary:
        out = str(Path(temporary) / options.recipe)
        sizes = ("--samples", "8", "--length", "1024")
        recipe = ("--recipe", options.recipe, "--calibration", calibration)
        made = fresh_process("quantize", "default", out, *recipe, *sizes)
        print(f"quantised in {made['seconds']} s to {made['megabytes']} MB")
        quantised, tokenizer = load_model(out)
        original, _ = load_model()
        tokens = evaluation_tokens(test, tokenizer, windows=12, length=1024)
        ppl = perplexity(original, tokens).value
        ppl_quantised = perplexity(quantised, tokens).value
        print(f"perplexity on {test}: fp32 {ppl:.3f}, {options.recipe} {ppl_quantised:.3f}")
        ratios, fp32, ours = prefill_ratio(original, quantised, tokens, 7 if options.quick else 21)
    print(f"prefill tok/s: fp32 {fp32:.0f}, {options.recipe} {ours:.0f}, ratios {ratios}")
    print(
        json.dumps(
            {
                f"prefill_{options.recipe}_vs_fp32": round(statistics.median(ratios), 3),
                f"ppl_ratio_{options.recipe}": round(ppl_quantised / ppl, 4),
                "peak_rss_mb": made["peak_rss_mb"],
                "quantise_seconds": made["seconds"],
                "text": "wikitext-2" if folder else "embedded",
                "threads": torch.get_num_threads(),
            }
        )
    )


@torch.no_grad()
def prefill_ratio(original, quantised, tokens, repeats: int) -> tuple[list[float], float, float]:
    """fp32 time over quantised time pair by pair, and tokens per second of each (medians)."""
    seconds: dict[str, list[float]] = {"fp32": [], "ours": []}
    for repeat in range(repeats + 1):
        prompt = tokens[repeat % len(tokens), :512][None]
        for name, model in (("fp32", original), ("ours", quantised)):
            start = time.perf_counter()
            model(prompt, use_cache=False)
            if repeat:  # the first pair warms up
                seconds[name].append(time.perf_counter() - start)
    ratios = [round(a / b, 3) for a, b in zip(seconds["fp32"], seconds["ours"], strict=True)]
    return ratios, *(512 / statistics.median(seconds[name]) for name in ("fp32", "ours"))


if __name__ == "__main__":
    main()
