"""Low-level kernels: one file per room of csrc, each with its public function and fake kernel."""

from saltire.ops.factored_linear import factored_gemm
from saltire.ops.gptq import gptq_round
from saltire.ops.isa import best_isa, current_isa, force_isa, isa_reason
from saltire.ops.lowbit_gemm import (
    lowbit_gemm,
    pack_weight,
    prepack_weight,
    unpack_weight,
    unprepack_weight,
)
from saltire.ops.sequence import Ordering, best_ordering, best_path
from saltire.ops.skip_plan import skip_plan_select
from saltire.ops.speculate import draw_tokens, speculate_verify, warp_logits
from saltire.ops.token_stats import (
    TokenStats,
    linear_token_stats,
    merge_shards,
    sharded_token_stats,
    token_stats,
    top_entropy_mask,
)
from saltire.ops.transform_quantize import transform, transform_quantize

__all__ = [
    "Ordering",
    "TokenStats",
    "best_isa",
    "best_ordering",
    "best_path",
    "current_isa",
    "draw_tokens",
    "factored_gemm",
    "force_isa",
    "gptq_round",
    "isa_reason",
    "linear_token_stats",
    "lowbit_gemm",
    "merge_shards",
    "pack_weight",
    "prepack_weight",
    "sharded_token_stats",
    "skip_plan_select",
    "speculate_verify",
    "token_stats",
    "top_entropy_mask",
    "transform",
    "transform_quantize",
    "unpack_weight",
    "unprepack_weight",
    "warp_logits",
]
