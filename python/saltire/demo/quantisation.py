"""The main job: the default model at fp32, bf16, W4A8, W4A4 and W2A4, measured side by side."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from saltire.demo.stage import Stage, fresh_process
from saltire.models.loading import load_model
from saltire.models.saving import save_checkpoint
from saltire.quant import quantize
from saltire.quant.evaluate import measured
from saltire.quant.texts import calibration_tokens

RECIPES = ("w4a8", "w4a4", "w2a4-g64")
WINDOWS = 4  # 4,096 tokens: enough to tell the rows apart
PROMPT = "Explain in two sentences why the sky is blue."


def run(folder: Path, console: Console) -> dict[str, Any]:
    """Quantise, save, reload in fresh processes, measure, generate."""
    rows: dict[str, dict[str, Any]] = {}
    model, tokenizer = load_model()
    for name in ("fp32", "bf16"):
        console.print(f"measuring {name}")
        present = model if name == "fp32" else copy.deepcopy(model).bfloat16()
        rows[name] = measured(present, tokenizer, "pydoc", WINDOWS, 1024, speed=True)
    console.print("the model writes its own calibration text")
    tokens = calibration_tokens("self", model, tokenizer, samples=8)
    for recipe in RECIPES:
        console.print(f"quantising to {recipe}, saving, measuring in a fresh process")
        if model is None:
            model, tokenizer = load_model()
        quantize(model, tokenizer, recipe, tokens)
        out = folder / recipe
        size = save_checkpoint(model, tokenizer, out)
        model = None  # the next recipe starts from the original
        rows[recipe] = fresh_process("eval", str(out), "--windows", str(WINDOWS), "--speed")
        rows[recipe]["megabytes"] = size / 1e6
    console.print(table(rows))
    console.print(
        "Perplexity on the prose of Python's help topics; calibration on text sampled from the "
        f"model; tokens/s through transformers with {torch.get_num_threads()} threads.",
        style="dim",
    )
    console.print(f"\n[bold]{RECIPES[1]}[/] answers: {PROMPT}")
    answer = fresh_process("generate", str(folder / RECIPES[1]), PROMPT, "--max-new-tokens", "64")
    console.print(answer["text"], highlight=False, markup=False)
    return {"rows": rows, "answer": answer}


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """One line a precision."""
    result = Table(title="SmolLM2-135M-Instruct", title_justify="left")
    for column in ("precision", "file MB", "perplexity", "prefill tok/s", "decode tok/s"):
        result.add_column(column, justify="left" if column == "precision" else "right")
    for name, row in rows.items():
        result.add_row(
            name,
            f"{row['megabytes']:.0f}",
            f"{row['perplexity']:.2f}",
            f"{row['prefill_tok_s']:.0f}",
            f"{row['decode_tok_s']:.1f}",
        )
    return result


QUANTISATION = Stage("quantisation", "BDQ: a language model in 4 bits, on our kernels", run)
