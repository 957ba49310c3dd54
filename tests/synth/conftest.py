"""The model that every small run shares."""

from __future__ import annotations

import pytest

from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def scorer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("scorer")
    tiny_model("llama", vocab_size=259, max_position_embeddings=512).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)
