"""A corpus of random words, a run small enough for a test, and what it wrote."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

from saltire.synth import SynthConfig

WORDS = "river stone bridge water flows under over north south mill wheel grain bread oven"


def corpus(path: Path, documents: int, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = [" ".join(rng.choices(WORDS.split(), k=rng.randint(4, 12))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def small(scorer: str, **changes) -> SynthConfig:
    values = {
        "target_tokens": 400,
        "encoder": "lexical",
        "scorer": scorer,
        "scorer_dtype": "float32",
        "context_window": 24,
        "score_window": 16,
        "group_size": 5,
        "samples_per_shard": 2,
    }
    return SynthConfig(**{**values, **changes})


def digests(out: Path) -> dict[str, str]:
    files = sorted(p for p in out.rglob("*") if p.is_file())
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
