"""Whole runs: documents of about 300 tokens to samples of 8k, and the memory of retrieval."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Report, Timing

from sections.wikitext import documents_of

RUN = """
import json, sys, torch
torch.set_num_threads(int(sys.argv[3]))
from saltire.synth import SynthConfig, synthesise
facts = synthesise([sys.argv[1]], sys.argv[2], SynthConfig(**json.loads(sys.argv[4])))
wanted = ("seconds", "peak_rss_mb", "documents", "samples", "tokens")
print(json.dumps({name: facts[name] for name in wanted}))
"""


def whole_runs(report: Report, quick: bool, threads: int) -> None:
    """Documents of about 300 tokens to samples of 8k; retrieval's memory at two sizes."""
    texts = documents_of(("test", "valid"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = 100 if quick else min(2000, len(texts))
        facts = _run(folder, "scored", texts[:count], threads, target_tokens=8192)
        seconds = sum(facts["seconds"].values())
        timing = Timing(f"{count} documents", [seconds] * 2)
        stages = {f"{stage}_s": value for stage, value in facts["seconds"].items()}
        report.row("synthesise, 8k samples", timing, **stages)
        report.key("minutes_of_2000", seconds / 60 * 2000 / count)
        # Without a scorer a run is retrieval: read, drop duplicates, embed, search, group, pack.
        rng = np.random.default_rng(0)
        peaks = []
        for many in (2000, 20000):
            mixed = (_mixed(texts, rng) for _ in range(many))
            options = {"order": "input", "encoder": "lexical", "target_tokens": 8192}
            facts = _run(folder, f"mixed-{many}", mixed, threads, **options)
            peaks.append(facts["peak_rss_mb"])
            stage = Timing(f"{many} documents", [sum(facts["seconds"].values())] * 2)
            report.row("retrieval", stage, peak_rss_mb=facts["peak_rss_mb"])
        report.key("retrieval_mb_2k", peaks[0])
        report.key("retrieval_mb_20k", peaks[1])


def _mixed(texts: list[str], rng: np.random.Generator) -> str:
    """A new document of sentences of three others, about 300 tokens."""
    chosen = [texts[i] for i in rng.integers(len(texts), size=3)]
    sentences = [s for text in chosen for s in text.split(". ")]
    return ". ".join(sentences[i] for i in rng.permutation(len(sentences)))[:1200]


def _run(
    folder: Path, name: str, texts: Iterable[str], threads: int, **options: object
) -> dict[str, Any]:
    source = folder / f"{name}.jsonl"
    with source.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    command = [sys.executable, "-c", RUN, str(source), str(folder / name), str(threads)]
    done = subprocess.run([*command, json.dumps(options)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts
