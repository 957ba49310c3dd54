"""``saltire eval MODEL``: perplexity, and speed if asked."""

from __future__ import annotations

from typing import Any

import typer

from saltire.cli import _console
from saltire.errors import SaltireError

DTYPES = ("float32", "bfloat16", "float16")


def register(app: typer.Typer) -> None:
    app.command("eval")(evaluate)


def evaluate(
    model: str = typer.Argument("default", help="default, a directory, a .gguf file or a hub name"),
    text: str = typer.Option("pydoc", help="pydoc, a .txt or .jsonl file, or a data set"),
    windows: int = typer.Option(8, help="windows spread over the text"),
    length: int = typer.Option(1024, help="tokens in one window"),
    dtype: str = typer.Option("float32", help="of what is not quantised: " + ", ".join(DTYPES)),
    speed: bool = typer.Option(False, help="also time a 512-token prefill and decoding"),
    json: bool = _console.JSON_OPTION,
) -> None:
    """Measure the perplexity of MODEL, each window read from its own start."""
    facts = measure(model, text, windows, length, dtype, speed)
    if json:
        _console.print_json(facts)
        return
    _console.out.print(
        f"perplexity {facts['perplexity']:.3f} over {facts['tokens']} tokens of {text}"
    )
    if speed:
        _console.out.print(
            f"prefill {facts['prefill_tok_s']:.0f} tokens/s, decode {facts['decode_tok_s']:.1f}"
            " tokens/s (through transformers)"
        )


def measure(
    model: str, text: str, windows: int, length: int, dtype: str, speed: bool
) -> dict[str, Any]:
    """What ``eval --json`` prints."""
    if dtype not in DTYPES:
        raise SaltireError(f"dtype = {dtype!r}; expected one of {', '.join(DTYPES)}.")
    import torch

    from saltire.models.loading import load_model
    from saltire.quant.evaluate import measured

    loaded, tokenizer = load_model(model, dtype=getattr(torch, dtype))
    facts = measured(loaded, tokenizer, text, windows, length, speed)
    return {"model": model, "dtype": dtype, "text": text, **facts}
