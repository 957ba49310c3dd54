"""Checks of a step's rows before kernels trust them: what the native decoder checks in C++."""

from __future__ import annotations

from collections.abc import Sequence

from saltire.errors import SaltireError
from saltire.nn.decoder import DecoderSizes
from saltire.nn.kv_cache import KVCache
from saltire.ops.decoder_layer import PRIVATE


def check_rows(
    cache: KVCache,
    sizes: DecoderSizes,
    rows: Sequence[Sequence[int]],
    wanted: Sequence[int],
    reads_tokens: bool,
) -> None:
    """Raise SaltireError, naming what it is, unless every row can be run on the cache."""
    if not rows:
        return
    tokens, sequences, positions, slots, prefixes, trees = zip(*rows, strict=True)
    room = cache.slots
    # As many as its highest bit of the tree says lie behind a row's prefix.
    reach = max(prefixes)
    if any(trees):
        bits = [tree.bit_length() if tree >= 0 else 64 for tree in trees]
        reach = max(prefix + more for prefix, more in zip(prefixes, bits, strict=True))
    for name, least, most, first, after in (
        ("token", min(tokens), max(tokens), 0, sizes.vocabulary),
        ("sequence", min(sequences), max(sequences), 0, cache.sequences),
        ("position", min(positions), max(positions), 0, min(sizes.positions, room)),
        ("slot", min(slots), max(slots), PRIVATE, room),
        ("prefix", min(prefixes), reach, 0, room + 1),
        ("number that is wanted", min(wanted, default=0), max(wanted, default=0), 0, len(rows)),
    ):
        if name == "token" and not reads_tokens:
            continue
        if least < first or most >= after:
            raise SaltireError(
                f"a row has {name} {least if least < first else most}; expected {first} to "
                f"{after - 1}."
            )
    if min(prefixes) == 0 and any(
        prefix == 0 and slot != PRIVATE and not tree
        for prefix, slot, tree in zip(prefixes, slots, trees, strict=True)
    ):
        raise SaltireError("a row sees no slot.")
