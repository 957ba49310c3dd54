"""``saltire generate MODEL PROMPT``: stream a continuation or an answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from saltire.cli import _console
from saltire.errors import SaltireError

if TYPE_CHECKING:
    from saltire.decode import Generation, Sampling, Session


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    model: str = typer.Argument(..., help="default, a directory, a .gguf file or a hub name"),
    prompt: str = typer.Argument(..., help="the text to answer or to continue"),
    max_new_tokens: int = typer.Option(128, help="tokens at most"),
    temperature: float = typer.Option(0.0, help="0 is greedy"),
    top_k: int = typer.Option(0, help="the largest k tokens; 0: all"),
    top_p: float = typer.Option(1.0, help="nucleus of the distribution, in (0, 1]"),
    min_p: float = typer.Option(0.0, help="share of the largest probability, in [0, 1]"),
    repetition_penalty: float = typer.Option(1.0, help="1 for none"),
    seed: int = typer.Option(0, help="seed of the sampling"),
    stop: list[str] = typer.Option([], help="text that ends the answer; may be repeated"),
    raw: bool = typer.Option(False, help="continue the prompt; no chat template"),
    draft: str = typer.Option("none", help="none, ngram, clasp, quantised or auto"),
    draft_model: str = typer.Option(
        "", help="the model at fewer bits, from saltire quantize; rounded: make one now, in seconds"
    ),
    skip: int = typer.Option(0, help="layers that clasp leaves out; 0: a quarter"),
    interval: int = typer.Option(64, help="verifications between two plans of clasp"),
    stats: bool = typer.Option(False, help="print what decoding and its drafts cost"),
    show_draft: bool = typer.Option(False, help="colour accepted drafts, strike rejected ones"),
    plot: Path | None = typer.Option(None, help="write a PNG of the layers clasp skipped"),
    json: bool = _console.JSON_OPTION,
) -> None:
    """Answer PROMPT (or continue it, with --raw) and print the text as it comes."""
    if not prompt.strip():
        raise SaltireError("the prompt is empty; expected some text.")
    if max_new_tokens < 1:
        raise SaltireError(f"max-new-tokens = {max_new_tokens}; expected at least 1.")
    from saltire.decode import Sampling, open_session
    from saltire.models.loading import load_model

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    loaded, tokenizer = load_model(model)
    cheap = draft_model if draft_model in ("", "rounded") else load_model(draft_model)[0]
    session = open_session(loaded, draft, cheap or None, skip=skip, interval=interval)
    live = not json and not show_draft
    out, text = run(session, tokenizer, prompt, max_new_tokens, sampling, stop, raw, live)
    if plot is not None:
        from saltire.report.decoding import plot_plans

        plot_plans(out.plans, plot)
    if json:
        facts = out.stats.to_dict()
        _console.print_json({"text": text, "interrupted": out.interrupted, **facts})
        return
    if show_draft:
        _console.out.print(coloured(out, tokenizer), soft_wrap=True)
    if stats:
        _print_stats(out)


def run(
    session: Session,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
    stop: list[str],
    raw: bool,
    live: bool,
) -> tuple[Generation, str]:
    """Generate; print the text as it comes if ``live``; return it with what it cost."""
    from saltire.decode.text import TextStream, encode_prompt, stop_tokens

    ids = encode_prompt(tokenizer, prompt, chat=not raw)
    stream = TextStream(tokenizer, stop)

    def show(_: int, tokens: list[int]) -> bool:
        new = stream.add(tokens)
        if live:
            sys.stdout.write(new)
            sys.stdout.flush()
        return stream.ended

    out = session.generate([ids], max_new_tokens, sampling, stop_tokens(tokenizer), show)
    rest = stream.finish()
    if live:
        print(rest)
    return out, stream.text


def coloured(out: Generation, tokenizer: Any) -> Any:
    """Accepted drafts in green, rejected ones struck in red, the target's own tokens plain."""
    from rich.text import Text

    rejected = dict(out.rejected[0])
    text = Text()
    for place, (token, drafted) in enumerate(zip(out.tokens[0], out.drafted[0], strict=True)):
        if place in rejected:
            text.append(tokenizer.decode([rejected[place]]), style="red strike")
        text.append(tokenizer.decode([token]), style="green" if drafted else "")
    return text


def _print_stats(out: Generation) -> None:
    from rich.table import Table

    stats = out.stats
    decode = stats.total_seconds - stats.prefill_seconds
    table = Table(title="decoding", show_header=False)
    first = max(stats.new_tokens - 1, 0)
    rows = [
        ("prompt tokens", f"{stats.prompt_tokens}"),
        ("time to first token", f"{stats.prefill_seconds:.3f} s"),
        ("new tokens", f"{stats.new_tokens}"),
        ("tokens / s behind the first", f"{first / decode:.1f}" if decode else "-"),
        ("tokens a verification", f"{stats.tokens_per_step:.2f}"),
        ("acceptance", f"{stats.acceptance:.2f}" if stats.offered else "-"),
    ]
    rows += [
        (f"acceptance of draft {i + 1}", f"{stats.accepted[i] / n:.2f} of {n}")
        for i, n in sorted(stats.offered.items())
    ]
    rows += [
        (
            "draft, verify, plan",
            " + ".join(
                f"{s:.2f}" for s in (stats.draft_seconds, stats.verify_seconds, stats.plan_seconds)
            )
            + " s",
        ),
        ("rounds", ", ".join(f"{name} {n}" for name, n in stats.rounds.most_common()) or "-"),
    ]
    for row in rows:
        table.add_row(*row)
    _console.out.print(table)
