"""Re3Syn: long samples from Python's own help topics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rich.console import Console

from saltire.demo.stage import Stage
from saltire.files import replacing_file
from saltire.report.synthesis import write_page
from saltire.synth import SynthConfig, synthesise

DOCUMENTS, PARAGRAPHS, SHORTEST = 48, 6, 400


def run(folder: Path, console: Console) -> dict[str, Any]:
    """Cut the topics into documents, put them together by what depends on what, and report."""
    folder.mkdir(parents=True, exist_ok=True)
    source, out = folder / "topics.jsonl", folder / "samples"
    with replacing_file(source) as temporary:
        rows = [json.dumps({"text": text}) + "\n" for text in documents()]
        temporary.write_text("".join(rows))
    if out.exists():
        shutil.rmtree(out)  # a demo is run again from the start
    # Words that two documents share find neighbours here; the minilm encoder is an extra.
    config = SynthConfig(target_tokens=4096, encoder="lexical", format="jsonl.zst", edges=3)
    facts = synthesise([str(source)], out, config)
    write_page(out)
    console.print(
        f"{facts['documents']} documents to {facts['samples']} samples of up to "
        f"{config.target_tokens} tokens, {facts['fill']:.0%} full; a document makes the next one "
        f"{facts['mean_gain']:.1f} nats likelier; direction at {facts['direction_snr']:.1f} times "
        "its noise.",
        highlight=False,
    )
    console.print(f"see {out / 'index.html'}", highlight=False)
    return facts


def documents() -> list[str]:
    """Pieces of six paragraphs of the help topics that come with Python."""
    from pydoc_data.topics import topics

    pieces = []
    for text in topics.values():
        paragraphs = text.split("\n\n")
        for start in range(0, len(paragraphs), PARAGRAPHS):
            piece = "\n\n".join(paragraphs[start : start + PARAGRAPHS])
            if len(piece) >= SHORTEST:
                pieces.append(piece)
    return pieces[:DOCUMENTS]


SYNTHESIS = Stage("synthesis", "Re3Syn: long samples from short documents", run)
