"""Specification of a cache of few bits: heads are rotated, each rounded to a grid of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from saltire.reference.transform_quantize import hadamard_matrix

KV_BITS = (2, 4, 8)

# Share of a head's range that its grid spans. After the rotation a head is near Gaussian: its 64 to
# 128 values span about 4.8 standard deviations. Sixteen levels over all of them have almost the
# spacing that is best for a Gaussian (0.34 deviations); four levels are best over 3.0 deviations.
RANGE_SHARE = {2: 0.65, 4: 1.0, 8: 1.0}


def rotate_heads(x: Tensor) -> Tensor:
    """Rotate each head by Hadamard matrices of the largest power of two in head_dim; its own
    inverse. x: float [..., head_dim]."""
    d = x.shape[-1]
    size = d & -d
    matrix = hadamard_matrix(size).to(x.device, x.dtype)
    return (x.unflatten(-1, (d // size, size)) @ matrix).flatten(-2)


def round_heads(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and grids of rotated heads, one grid a head: ``x ≈ code · scale + low``.

    The grid spans RANGE_SHARE of [min x, max x] about its middle. Scale and low are rounded to
    float16 before codes are chosen, as they are stored. Where the scale is 0, so are the codes; a
    head that holds a NaN or an infinity has low NaN: marked, not silently wrong.
    x: float32 [..., head_dim]. Returns codes uint8 [..., head_dim], scale and low float16 [..., 1].
    """
    top = 2**bits - 1
    most = torch.finfo(torch.float16).max
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    cut = (high - low) * ((1.0 - RANGE_SHARE[bits]) / 2)
    low, high = low + cut, high - cut
    scale = ((high - low) / top).clamp(max=most).half()
    low = low.clamp(-most, most).half()
    low = torch.where(x.isfinite().all(-1, keepdim=True), low, torch.nan)
    step = scale.float()
    codes = ((x - low.float()) / torch.where(step > 0, step, 1.0)).round().clamp(0, top)
    return torch.where(step > 0, codes, 0.0).nan_to_num().to(torch.uint8), scale, low


def read_heads(codes: Tensor, scale: Tensor, low: Tensor) -> Tensor:
    """What codes stand for, still rotated: float32 [..., head_dim]."""
    return codes.float() * scale.float() + low.float()
