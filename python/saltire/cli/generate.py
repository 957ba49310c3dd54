"""``saltire generate MODEL PROMPT``: stream a continuation or an answer."""

from __future__ import annotations

import sys
import time
from typing import Any

import typer

from saltire.cli import _console
from saltire.errors import SaltireError


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    model: str = typer.Argument(..., help="default, a directory, a .gguf file or a hub name"),
    prompt: str = typer.Argument(..., help="the text to answer or to continue"),
    max_new_tokens: int = typer.Option(128, help="tokens at most"),
    temperature: float = typer.Option(0.0, help="0 is greedy"),
    top_p: float = typer.Option(1.0, help="nucleus of the distribution, in (0, 1]"),
    seed: int = typer.Option(0, help="seed of the sampling"),
    raw: bool = typer.Option(False, help="continue the prompt; no chat template"),
    json: bool = _console.JSON_OPTION,
) -> None:
    """Answer PROMPT (or continue it, with --raw) and print the text as it comes."""
    check(prompt, max_new_tokens, temperature, top_p)
    from saltire.models.loading import load_model

    loaded, tokenizer = load_model(model)
    facts = run(loaded, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, raw, not json)
    if json:
        _console.print_json(facts)


def check(prompt: str, max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse what cannot be generated, before a model is loaded."""
    if not prompt.strip():
        raise SaltireError("the prompt is empty; expected some text.")
    if max_new_tokens < 1:
        raise SaltireError(f"max-new-tokens = {max_new_tokens}; expected at least 1.")
    if temperature < 0:
        raise SaltireError(f"temperature = {temperature}; expected 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise SaltireError(f"top-p = {top_p}; expected a share in (0, 1].")


def run(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    raw: bool,
    stream: bool,
) -> dict[str, Any]:
    """Generate; print the text as it comes if ``stream``; return what ``--json`` prints."""
    import torch
    from transformers import TextStreamer

    chat = not raw and tokenizer.chat_template is not None
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    room = getattr(model.config, "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if room is not None and length + max_new_tokens > room:
        raise SaltireError(
            f"the prompt has {length} tokens and {max_new_tokens} more are asked for; "
            f"the model has room for {room}. Shorten one of them."
        )
    torch.manual_seed(seed)
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    start = time.perf_counter()
    output = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        streamer=streamer if stream else None,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        **sampling,
    )
    seconds = time.perf_counter() - start
    new = output[0, length:]
    if stream:
        sys.stdout.flush()
    return {
        "prompt_tokens": length,
        "new_tokens": int(new.numel()),
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "seconds": seconds,
    }
