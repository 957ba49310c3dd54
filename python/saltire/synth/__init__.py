"""Re3Syn: short documents to long samples with real dependencies (docs/re3syn.md)."""

from saltire.synth.config import SynthConfig
from saltire.synth.metrics import (
    chunk_perplexities,
    dependency_distance,
    key_token_gap,
    long_dependency_score,
    ngram_copy_rate,
    token_nlls,
)
from saltire.synth.pack import cu_seqlens, document_mask, position_ids
from saltire.synth.pipeline import synthesise

__all__ = [
    "SynthConfig",
    "chunk_perplexities",
    "cu_seqlens",
    "dependency_distance",
    "document_mask",
    "key_token_gap",
    "long_dependency_score",
    "ngram_copy_rate",
    "position_ids",
    "synthesise",
    "token_nlls",
]
