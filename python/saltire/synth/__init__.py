"""Re3Syn: short documents to long samples with real dependencies (docs/re3syn.md)."""

from saltire.synth.config import SynthConfig
from saltire.synth.pack import cu_seqlens, document_mask, position_ids
from saltire.synth.pipeline import synthesise

__all__ = ["SynthConfig", "cu_seqlens", "document_mask", "position_ids", "synthesise"]
