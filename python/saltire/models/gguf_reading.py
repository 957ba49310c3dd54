"""Reading a GGUF file once and quietly: transformers opens it for config, tokenizer and weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def reading_gguf_once() -> Iterator[None]:
    """Within it, transformers shares one reader of a GGUF file, and shows no bar.

    A vocabulary of 49,152 tokens is 100,000 fields; gguf's reader looks each up in a memory map,
    whose slices are slow to make, and transformers parses them three times and builds the table of
    names once for every module. Only what is repeated is left out here: 4 s in place of 24 s for
    SmolLM2-135M. The values are the library's own.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    shared = {
        "GGUFReader": functools.cache(_plain_reader()),
        "get_tensor_name_map": functools.cache(gguf.get_tensor_name_map),
    }
    theirs = {name: getattr(gguf, name) for name in shared}
    bar = getattr(loader, "tqdm", None)
    try:
        for name, ours in shared.items():
            setattr(gguf, name, ours)
        loader.tqdm = lambda items, **_: items
        yield
    finally:
        for name, old in theirs.items():
            setattr(gguf, name, old)
        loader.tqdm = bar


def _plain_reader() -> type[Any]:
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):
        """gguf's reader over a plain array of the same memory map."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "data" and isinstance(value, np.memmap):
                value = value.view(np.ndarray)
            super().__setattr__(name, value)

    return PlainReader
