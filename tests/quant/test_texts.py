"""Where text comes from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from saltire.errors import SaltireError
from saltire.quant import texts
from saltire.quant.evaluate import measure_speed, perplexity
from saltire.quant.texts import calibration_tokens, evaluation_tokens, source_text
from tests.tiny import random_tokens, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_windows_spread_from_the_first_to_the_last_token(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "".join(chr(97 + i % 26) for i in range(1000)))
    tokens = evaluation_tokens(source, TOKENIZER, windows=5, length=100)
    assert tokens.shape == (5, 100)
    everything = TOKENIZER(Path(source).read_text())["input_ids"]
    assert tokens[0].tolist() == everything[:100]
    assert tokens[-1].tolist() == everything[-100:]


def test_no_more_windows_than_fit_without_overlap(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "x" * 350)
    assert evaluation_tokens(source, TOKENIZER, windows=9, length=100).shape == (3, 100)


def test_calibration_windows_depend_on_the_seed_only(tmp_path: Path) -> None:
    source = write(tmp_path / "a.txt", "".join(chr(32 + i * i % 90) for i in range(3000)))
    options = {"samples": 4, "length": 50}
    one = calibration_tokens(source, None, TOKENIZER, seed=1, **options)
    assert torch.equal(one, calibration_tokens(source, None, TOKENIZER, seed=1, **options))
    assert not torch.equal(one, calibration_tokens(source, None, TOKENIZER, seed=2, **options))


def test_jsonl_gives_its_texts(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": word}) for word in ("one", "two"))
    assert source_text(write(tmp_path / "a.jsonl", lines + "\n\n")) == "one\n\ntwo"


def test_pydoc_needs_no_file() -> None:
    assert len(source_text("pydoc")) > 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\t ", "holds no text"),
        ("picture.png", b"\x89PNG\xff\xfe\x00", "not UTF-8 text"),
        ("zeros.txt", b"abc\0def" * 50, "holds zero bytes"),
        ("short.txt", b"only a few words", "16 tokens; expected at least 64"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("other.jsonl", b'{"body": "a"}', 'line 1: expected an object with a string "text"'),
        ("list.jsonl", b"[1, 2]", "line 1: expected an object"),
        ("empty.jsonl", b"", "holds no text"),
    ],
)
def test_unusable_files_are_refused_with_the_reason(tmp_path, name, content, message) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SaltireError, match=message):
        calibration_tokens(str(path), None, TOKENIZER, samples=2, length=64)


@pytest.mark.parametrize("source", ["missing.txt", "./missing", "/missing/file"])
def test_missing_files_are_named(source) -> None:
    with pytest.raises(SaltireError, match=f"there is no file {source}"):
        source_text(source)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaltireError, match="is a directory"):
        source_text(str(tmp_path))


@pytest.mark.parametrize(("samples", "length"), [(0, 64), (2, 1)])
def test_impossible_sizes_are_refused(samples, length) -> None:
    with pytest.raises(SaltireError, match="at least 1"):
        calibration_tokens("pydoc", None, TOKENIZER, samples=samples, length=length)


def test_sampling_from_the_model_follows_its_distribution() -> None:
    model = tiny_model("llama", vocab_size=259)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[70] = 5.0  # tied head: no token wins by its own logit
    one = calibration_tokens("self", model, TOKENIZER, samples=3, length=20, seed=4)
    assert one.shape == (3, 20)
    assert torch.equal(
        one, calibration_tokens("self", model, TOKENIZER, samples=3, length=20, seed=4)
    )
    assert len(one.unique()) > 10, "sampled greedily"


def test_what_is_sampled_does_not_depend_on_who_computes_the_logits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    ours = calibration_tokens("self", model, TOKENIZER, samples=3, length=24)

    def refuse(model: object) -> None:
        raise SaltireError("another architecture")

    monkeypatch.setattr(texts, "build_decoder", refuse)
    assert torch.equal(calibration_tokens("self", model, TOKENIZER, samples=3, length=24), ours)


@torch.no_grad()
@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(monkeypatch, ours, value) -> None:
    model = tiny_model("llama")
    model.model.norm.weight[3] = value

    def refuse(model: object) -> None:
        raise SaltireError("another architecture")

    if not ours:
        monkeypatch.setattr(texts, "build_decoder", refuse)
    with pytest.raises(SaltireError, match=r"after \d+ tokens its logits hold NaN or infinity"):
        calibration_tokens("self", model, TOKENIZER, samples=2, length=12)


def test_many_texts_are_written_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    first = calibration_tokens("self", model, TOKENIZER, samples=2, length=16)
    monkeypatch.setattr(texts, "AT_ONCE", 2)
    three = calibration_tokens("self", model, TOKENIZER, samples=3, length=16)
    assert three.shape == (3, 16)
    assert torch.equal(three[:2], first)
    assert len(three.unique(dim=0)) == 3


def test_perplexity_of_a_uniform_model_is_the_size_of_its_vocabulary() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    result = perplexity(model, random_tokens(model, 3, 300))
    assert result.value == pytest.approx(128, rel=1e-5)
    assert result.tokens == 3 * 299


def test_perplexity_is_the_exponential_of_the_mean_loss() -> None:
    model = tiny_model("qwen2")
    tokens = random_tokens(model, 1, 40)
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss
    assert perplexity(model, tokens).nll == pytest.approx(float(loss), rel=1e-5)


def test_a_damaged_model_has_no_perplexity() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(SaltireError, match="the loss of window 0 is nan"):
        perplexity(model, random_tokens(model, 1, 8))


def test_speed_counts_every_token() -> None:
    model = tiny_model("llama")
    speed = measure_speed(model, random_tokens(model, 1, 16)[0], new_tokens=4, repeats=2)
    assert speed.prefill > 0
    assert speed.decode > 0
