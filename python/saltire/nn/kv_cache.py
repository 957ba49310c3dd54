"""The keys and values of a decoder: one static buffer with one committed length a sequence."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.ops.decoder_layer import SLOT_BLOCK

UINT4: torch.dtype = torch.uint4  # type: ignore[attr-defined]  # not in the stubs
UINT2: torch.dtype = torch.uint2  # type: ignore[attr-defined]
CODE_BITS = {torch.uint8: 8, UINT4: 4, UINT2: 2}
CACHE_DTYPES = (torch.float32, torch.bfloat16, *CODE_BITS)


class KVCache:
    """A static buffer for B sequences of up to T slots; slot = position.

    Slots below ``lengths[b]`` are committed. What lies behind is of no account: drafts write there,
    verification overwrites it, and a rollback only sets the length. ``share`` and ``keep`` do copy.

    dtype: float32, bfloat16, or uint8, uint4 or uint2: codes of keys and values that are rotated by
    a Hadamard matrix, with a grid for each slot of a head (``saltire.reference.kv_cache``).
    kv: [L, 2, B, kv_heads, T, head_dim] in float32 or bfloat16; codes in bytes, with the last
    dimension as many bytes as they fill, and ``scales`` float16 [L, 2, B, kv_heads, 2, T].
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        sequences: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        if dtype not in CACHE_DTYPES:
            raise SaltireError(f"a cache of {dtype}; expected one of {list(CACHE_DTYPES)}.")
        if sequences < 1 or slots < 1:
            raise SaltireError(
                f"a cache of {sequences} sequences with {slots} slots; expected at least 1 of each."
            )
        slots = (slots + SLOT_BLOCK - 1) // SLOT_BLOCK * SLOT_BLOCK
        self.dtype, bits = dtype, CODE_BITS.get(dtype)
        shape = (layers, 2, sequences, kv_heads, slots, head_dim * (bits or 8) // 8)
        # Zeros, not whatever was there: a NaN behind the committed length would not stay there.
        self.kv = torch.zeros(shape, dtype=torch.uint8 if bits else dtype, device=device)
        grids = (*shape[:-2], 2, slots)
        f16 = torch.float16
        self.scales = torch.zeros(grids, dtype=f16, device=device) if bits else None
        self.lengths = [0] * sequences

    @property
    def sequences(self) -> int:
        return self.kv.shape[2]

    @property
    def slots(self) -> int:
        return self.kv.shape[4]

    @property
    def bytes(self) -> int:
        """Memory of the keys, values and their grids."""
        scales = 0 if self.scales is None else self.scales.numel() * 2
        return self.kv.numel() * self.kv.element_size() + scales

    def check_room(self, new: Sequence[int]) -> None:
        """Raise SaltireError unless sequence b has room for ``new[b]`` more tokens."""
        for b, count in enumerate(new):
            if self.lengths[b] + count > self.slots:
                raise SaltireError(
                    f"sequence {b} has {self.lengths[b]} tokens and {count} more are coming; the "
                    f"cache holds {self.slots}. Make a longer cache or shorten the prompt."
                )

    def roll_back(self, sequence: int, length: int) -> None:
        """Forget all but the first ``length`` tokens of a sequence."""
        if not 0 <= length <= self.lengths[sequence]:
            raise SaltireError(
                f"sequence {sequence} has {self.lengths[sequence]} tokens; it cannot be rolled "
                f"back to {length}."
            )
        self.lengths[sequence] = length

    def share(self, source: int, target: int, length: int) -> None:
        """Let sequence ``target`` begin with the first ``length`` tokens of ``source``."""
        if not 0 <= length <= self.lengths[source]:
            raise SaltireError(
                f"sequence {source} has {self.lengths[source]} tokens; {length} cannot be shared."
            )
        end = -(-length // SLOT_BLOCK) * SLOT_BLOCK  # whole blocks: within one, keys lie transposed
        self.kv[:, :, target, :, :end] = self.kv[:, :, source, :, :end]
        if self.scales is not None:
            self.scales[:, :, target, ..., :end] = self.scales[:, :, source, ..., :end]
        self.lengths[target] = length

    def keep(self, old: KVCache) -> None:
        """Take over all that ``old`` holds, a cache of the same sequences with fewer slots."""
        self.kv[..., : old.slots, :] = old.kv
        if self.scales is not None and old.scales is not None:
            self.scales[..., : old.slots] = old.scales
        self.lengths = list(old.lengths)

    def adopt(self, kv: Tensor, scales: Tensor | None) -> None:
        """Live on in the memory of a cache of the same shape that nobody uses any more."""
        self.kv, self.scales = kv.zero_(), scales if scales is None else scales.zero_()

    def reorder(self, sequences: Sequence[int]) -> None:
        """Let sequence b go on from what sequence ``sequences[b]`` holds."""
        index = torch.tensor(list(sequences), device=self.kv.device)
        self.kv = self.kv.index_select(2, index)
        if self.scales is not None:
            self.scales = self.scales.index_select(2, index)
        self.lengths = [self.lengths[b] for b in sequences]

    def state(self) -> tuple[Tensor, Tensor | None]:
        """The buffers for ``decoder_step``."""
        return self.kv, self.scales
