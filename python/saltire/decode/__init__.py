"""Decoding on Saltire's native decoder, plain or speculative; speculation never changes the law of
the output. ``docs/clasp.md`` says what is the paper's and what is ours."""

from saltire.decode.drafts import Draft, Guide, ModelDraft, NgramDraft, Proposal
from saltire.decode.generation import Generation
from saltire.decode.plan import Plan, SkipPlanner
from saltire.decode.sampling import Sampling
from saltire.decode.session import Session
from saltire.decode.setup import DRAFTS, custom_generate, open_session
from saltire.decode.stats import DecodeStats

__all__ = [
    "DRAFTS",
    "DecodeStats",
    "Draft",
    "Generation",
    "Guide",
    "ModelDraft",
    "NgramDraft",
    "Plan",
    "Proposal",
    "Sampling",
    "Session",
    "SkipPlanner",
    "custom_generate",
    "open_session",
]
