"""A saved checkpoint in transformers' own tools, which know nothing of us but the registration."""

from __future__ import annotations

from pathlib import Path

from transformers import pipeline

from saltire.models.saving import save_checkpoint
from saltire.quant import quantize
from tests.tiny import random_tokens, tiny_model, tiny_tokenizer


def test_a_pipeline_loads_a_checkpoint_and_writes(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama", vocab_size=259), tiny_tokenizer()
    quantize(model, tokenizer, "w4a4", random_tokens(model, 4, 64))
    save_checkpoint(model, tokenizer, tmp_path / "q")
    write = pipeline("text-generation", model=str(tmp_path / "q"), max_new_tokens=5)
    written = write("abc", do_sample=False, return_full_text=False)[0]["generated_text"]
    prompt = tokenizer("abc", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False)[0]
    expected = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert written == expected
