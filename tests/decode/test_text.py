"""Streaming text: nothing given out is taken back, stop strings may lie across tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from saltire.decode.text import TextStream, encode_prompt
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def stream(text: str, pieces: int, stop: list[str]) -> tuple[str, bool]:
    out = TextStream(TOKENIZER, stop)
    tokens = TOKENIZER(text)["input_ids"]
    got = "".join(out.add(tokens[i : i + pieces]) for i in range(0, len(tokens), pieces))
    return got + out.finish(), out.ended


@given(st.text(alphabet="abxé€ ", max_size=30), st.integers(1, 5))
def test_all_text_comes_out_once(text: str, pieces: int) -> None:
    assert stream(text, pieces, []) == (text, False)


@given(st.text(alphabet="ab", max_size=24), st.integers(1, 5))
def test_text_ends_before_the_first_stop_string(text: str, pieces: int) -> None:
    expected = text.split("abb")[0]
    assert stream(text, pieces, ["abb"]) == (expected, "abb" in text)


def test_a_stop_string_may_end_inside_a_token() -> None:
    class OneToken:
        def decode(self, tokens, skip_special_tokens):
            return "".join(["Hello", " world. And", " more"][t] for t in tokens)

    out = TextStream(OneToken(), ["world"])
    assert out.add([0]) == "Hello"
    assert out.add([1]) == " "
    assert out.ended
    assert out.add([2]) == "" == out.finish()


def test_a_prompt_without_a_template_is_the_text_itself() -> None:
    assert TOKENIZER.decode(encode_prompt(TOKENIZER, "abc")) == "abc"
