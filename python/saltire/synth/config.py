"""What a run is asked for, checked when made, and compared when a run is resumed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saltire.errors import SaltireError

SCORED_ORDERS = ("ordering", "path", "distance", "reversed")
ORDERS = (*SCORED_ORDERS, "shuffle", "length", "neighbour", "input")
FORMATS = ("parquet", "jsonl.zst", "dataset")
SEPARATORS = ("blank", "raw", "eos")


@dataclass(frozen=True)
class SynthConfig:
    """Everything that decides what a run writes. Raises SaltireError for what cannot be.

    target_tokens: longest sample. order: of the documents of a group; ``ordering`` (all pairs
    forward), ``path`` (neighbours only) and ``distance`` (pairs weighted by the tokens between
    them) maximise dependency, ``reversed`` minimises it; ``shuffle``, ``length`` (longest first),
    ``neighbour`` (most similar next, as ICLM) and ``input`` need no scorer. slope: of ``distance``;
    above 0 far pairs count more. group_size: documents ordered together. neighbours: nearest
    documents looked up. edges: of a document within its group that are scored, in both directions.
    max_uses: samples that one document may appear in. near_duplicate: Jaccard overlap of 5-token
    shingles at which a document is dropped (1: exact copies only). max_similarity: documents of a
    higher cosine are not put together. encoder, scorer, tokenizer: names or paths; an empty
    tokenizer is the scorer's. context_window: tokens of the tail of A; score_window: tokens of the
    head of B. separator: ``blank`` line, ``raw`` (nothing), ``eos``, or ``text:...``. split: cut
    documents that exceed target_tokens instead of leaving them out. strict: refuse what cannot be
    read instead of counting it.
    """

    target_tokens: int = 32768
    order: str = "ordering"
    slope: float = 1.0
    group_size: int = 16
    neighbours: int = 16
    edges: int = 4
    max_uses: int = 1
    near_duplicate: float = 0.8
    max_similarity: float = 0.95
    encoder: str = "minilm"
    scorer: str = "default"
    scorer_dtype: str = "auto"
    tokenizer: str = ""
    context_window: int = 128
    score_window: int = 64
    separator: str = "blank"
    split: bool = False
    strict: bool = False
    text_key: str = "text"
    format: str = "parquet"
    samples_per_shard: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        def want(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise SaltireError(f"{name} = {getattr(self, name)!r}; expected {expected}.")

        want(self.target_tokens >= 16, "target_tokens", "at least 16")
        want(self.order in ORDERS, "order", "one of " + ", ".join(ORDERS))
        want(self.format in FORMATS, "format", "one of " + ", ".join(FORMATS))
        dtypes = ("auto", "float32", "bfloat16")
        want(self.scorer_dtype in dtypes, "scorer_dtype", "one of " + ", ".join(dtypes))
        want(-1 <= self.slope <= 100, "slope", "-1 to 100")
        want(2 <= self.group_size <= 512, "group_size", "2 to 512")
        want(1 <= self.neighbours <= 256, "neighbours", "1 to 256")
        want(1 <= self.edges <= 512, "edges", "1 to 512")
        want(self.max_uses >= 1, "max_uses", "at least 1")
        want(0 < self.near_duplicate <= 1, "near_duplicate", "an overlap above 0, at most 1")
        want(0 < self.max_similarity <= 1, "max_similarity", "a cosine above 0, at most 1")
        want(self.context_window >= 1, "context_window", "at least 1 token")
        want(self.score_window >= 2, "score_window", "at least 2 tokens: the first is not scored")
        want(self.samples_per_shard >= 1, "samples_per_shard", "at least 1")
        want(
            self.separator in SEPARATORS or self.separator.startswith("text:"),
            "separator",
            "blank, raw, eos or text: and the text",
        )

    @property
    def needs_scores(self) -> bool:
        return self.order in SCORED_ORDERS

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two configurations, a line each, by name."""
    return [
        f"{name} was {json.dumps(old.get(name))}, now {json.dumps(new.get(name))}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]
