"""``saltire synth IN... OUT``: long-context training samples from short documents."""

from __future__ import annotations

from pathlib import Path

import typer

from saltire.cli import _console


def register(app: typer.Typer) -> None:
    app.command("synth")(synth)


def synth(
    inputs: list[str] = typer.Argument(
        ..., help="jsonl (.gz, .zst), parquet, text files, folders of them, or datasets"
    ),
    out: Path = typer.Argument(..., help="folder of the samples"),
    target_tokens: int = typer.Option(32768, help="tokens of the longest sample"),
    order: str = typer.Option(
        "ordering",
        help="ordering, path, distance, reversed, shuffle, length, neighbour or input",
    ),
    slope: float = typer.Option(1.0, help="of --order distance: above 0 far pairs count more"),
    group_size: int = typer.Option(16, help="documents ordered together"),
    neighbours: int = typer.Option(16, help="nearest documents looked up"),
    edges: int = typer.Option(4, help="of a document in its group, scored in both directions"),
    max_uses: int = typer.Option(1, help="samples that one document may appear in"),
    near_duplicate: float = typer.Option(0.8, help="overlap at which a document is dropped"),
    max_similarity: float = typer.Option(0.95, help="cosine above which two stay apart"),
    encoder: str = typer.Option("minilm", help="minilm, lexical, or a sentence-transformers model"),
    scorer: str = typer.Option("default", help="causal model that recognises dependency"),
    scorer_dtype: str = typer.Option("auto", help="auto, float32 or bfloat16"),
    tokenizer: str = typer.Option("", help="model whose tokens count; default: the scorer's"),
    context_window: int = typer.Option(128, help="tokens of the tail of A"),
    score_window: int = typer.Option(64, help="tokens of the head of B"),
    separator: str = typer.Option("blank", help="blank, raw, eos or text:..."),
    split: bool = typer.Option(False, "--split", help="cut documents longer than the target"),
    strict: bool = typer.Option(False, "--strict", help="refuse rows that cannot be read"),
    text_key: str = typer.Option("text", help="field of the text"),
    format: str = typer.Option("parquet", help="parquet, jsonl.zst or dataset"),
    samples_per_shard: int = typer.Option(64, help="samples in one file"),
    seed: int = typer.Option(0, help="of shuffles and searches"),
    resume: bool = typer.Option(False, "--resume", help="go on with a run that was cut off"),
    workers: int = typer.Option(1, help="processes"),
    engine: str = typer.Option("local", help="local or ray"),
    cache: str = typer.Option("", help="file of scores shared between runs"),
    json: bool = _console.JSON_OPTION,
) -> None:
    """Retrieve related documents, recognise what depends on what, reorder and pack them."""
    from saltire.report.synthesis import write_page
    from saltire.synth import SynthConfig, synthesise

    config = SynthConfig(
        target_tokens=target_tokens,
        order=order,
        slope=slope,
        group_size=group_size,
        neighbours=neighbours,
        edges=edges,
        max_uses=max_uses,
        near_duplicate=near_duplicate,
        max_similarity=max_similarity,
        encoder=encoder,
        scorer=scorer,
        scorer_dtype=scorer_dtype,
        tokenizer=tokenizer,
        context_window=context_window,
        score_window=score_window,
        separator=separator,
        split=split,
        strict=strict,
        text_key=text_key,
        format=format,
        samples_per_shard=samples_per_shard,
        seed=seed,
    )
    facts = synthesise(
        inputs, out, config, resume=resume, workers=workers, engine=engine, cache=cache or None
    )
    write_page(out)
    if json:
        _console.print_json(facts)
        return
    print_facts(facts, out)


def print_facts(facts: dict[str, object], out: Path) -> None:
    """What a person wants to know of a finished run."""
    skipped = facts["skipped"]
    assert isinstance(skipped, dict)
    rows = [
        ("documents read", facts["rows"]),
        ("skipped", sum(skipped.values())),
        ("duplicates, exact and near", f"{facts['exact_duplicates']} + {facts['near_duplicates']}"),
        ("longer than the target", facts["longer_than_target"]),
        ("samples", facts["samples"]),
        ("tokens", facts["tokens"]),
        ("fill", f"{facts['fill']:.1%}"),
        ("edges scored", facts["edges"]),
        ("mean gain, nats", f"{facts['mean_gain']:.2f}"),
        ("direction, signal to noise", f"{facts['direction_snr']:.2f}"),
        ("mean distance of a gain, tokens", f"{facts['mean_distance']:,.0f}"),
        ("8-grams copied from before", f"{facts['copy_rate']:.2%}"),
    ]
    _console.out.print(
        _console.table(f"samples in {out}", ("", ""), [(k, str(v)) for k, v in rows])
    )
    for kind, places in facts["skipped_places"].items():  # type: ignore[attr-defined]
        _console.out.print(f"{kind}: {skipped[kind]}, first {places[0]}", style="dim")
    _console.out.print(f"see {out / 'index.html'}")
