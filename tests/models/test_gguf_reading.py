"""Reading a GGUF file once: the same values, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from saltire.models.gguf_reading import reading_gguf_once
from saltire.models.loading import load_model


def small_file(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list([f"token {n}" for n in range(50)])
    writer.add_float32("scale", 0.25)
    writer.add_tensor("output.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_fields_and_tensors_are_those_of_the_library(tmp_path: Path) -> None:
    path = small_file(tmp_path / "a.gguf")
    plain = gguf.GGUFReader(path)
    with reading_gguf_once():
        ours = gguf.GGUFReader(path)
        assert gguf.GGUFReader(path) is ours
    assert type(ours.data) is np.ndarray
    assert list(ours.fields) == list(plain.fields)
    for name, field in plain.fields.items():
        for part, other in zip(ours.fields[name].parts, field.parts, strict=True):
            assert np.array_equal(part, other)
    for tensor, other in zip(ours.tensors, plain.tensors, strict=True):
        assert tensor.name == other.name
        assert np.array_equal(tensor.data, other.data)


def test_the_library_is_as_before_afterwards_even_after_an_error() -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map

    def fail() -> None:
        with reading_gguf_once():
            assert gguf.GGUFReader is not before[0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


@torch.no_grad()
def test_the_default_model_is_saved_and_read_as_an_ordinary_one(tmp_path: Path) -> None:
    model, tokenizer = load_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path, dtype=torch.bfloat16)
    tokens = torch.arange(100, 108)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
