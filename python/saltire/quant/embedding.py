"""Rounding an embedding: each row is looked up, never multiplied, so nearest is best."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.nn.quant_embedding import GROUPS, EmbeddingFormat, QuantEmbedding
from saltire.quant.finite import all_finite
from saltire.quant.gptq import choose_grid

ROWS = 4096  # rounded at once
# Below this a float16 has too few bits left for a scale; rows so small are rounded on this one.
LEAST_SCALE = 2.0**-18


def round_embedding(embedding: nn.Embedding, bits: int, where: str) -> QuantEmbedding:
    """Its weight [V, D] in 8 or 4 bits, in groups of 64 (or 32, or 128) values.

    8 bits span each group's range; at 4 bits the range is searched for the least squared error.
    Raises SaltireError for weights that are not finite or too large for float16 scales, and for a
    D that no group divides.
    """
    weight = embedding.weight.detach()
    if not all_finite(weight):
        raise SaltireError(f"{where} holds NaN or infinity. Check the model's files.")
    V, D = weight.shape
    fitting = [group for group in (64, *GROUPS) if D % group == 0]
    format = EmbeddingFormat(bits, fitting[0] if fitting else 64)
    format.check_fits(where, D)
    made = QuantEmbedding(V, D, format, weight.dtype)
    pieces = [_rounded(rows.float(), format) for rows in weight.split(ROWS)]
    made.weight_packed = torch.cat([packed for packed, _ in pieces])
    made.weight_scale = torch.cat([scale for _, scale in pieces])
    if not all_finite(made.weight_scale):
        raise SaltireError(
            f"{where} holds values up to {float(weight.abs().max()):.3g}, more than a float16 "
            "scale can span. Leave the embedding at 16 bits."
        )
    return made


def _rounded(w: Tensor, format: EmbeddingFormat) -> tuple[Tensor, Tensor]:
    groups = w.unflatten(-1, (-1, format.group))
    if format.embedding_bits == 8:
        scale = (groups.abs().amax(-1) / 127).clamp_min(LEAST_SCALE).half()
    else:
        grid = choose_grid(w, torch.ones(w.shape[1]), 4, format.group, False, torch.float16)
        scale = grid.scale.half()
    top = 2 * format.zero - 1
    codes = (groups / scale.float()[..., None] + format.zero).round_().clamp_(0, top)
    codes = codes.flatten(-2).to(torch.uint8)
    if format.embedding_bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return codes, scale
