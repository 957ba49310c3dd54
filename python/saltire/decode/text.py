"""From text to tokens and back: chat templates, stop tokens, streaming text with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def encode_prompt(tokenizer: Any, prompt: str, chat: bool = True) -> list[int]:
    """Token ids of a prompt, in the tokenizer's chat template if it has one and ``chat``."""
    if chat and tokenizer.chat_template is not None:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        return list(ids)
    return list(tokenizer(prompt)["input_ids"])


def stop_tokens(tokenizer: Any) -> list[int]:
    """The tokens that end an answer."""
    eos = tokenizer.eos_token_id
    return [] if eos is None else [int(eos)]


class TextStream:
    """Tokens to text as they come, cut before the first stop string.

    Text that may still become a stop string, or a character whose bytes are not all there, is held
    back: what was given out is never taken back. A stop string may end inside a token.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [s for s in stop if s]
        self.tokens: list[int] = []
        self.text = ""
        self.ended = False

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens release."""
        if self.ended:
            return ""
        self.tokens.extend(tokens)
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return self._release(whole, last=False)

    def finish(self) -> str:
        """What was held back."""
        if self.ended:
            return ""
        whole = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        return self._release(whole, last=True)

    def _release(self, whole: str, last: bool) -> str:
        places = [at for at in (whole.find(s) for s in self.stop) if at >= 0]
        if places:
            whole, self.ended = whole[: min(places)], True
        elif not last:
            held = max((self._overlap(whole, s) for s in self.stop), default=0)
            whole = whole[: len(whole) - held].rstrip("\ufffd")
        new = whole[len(self.text) :]
        self.text += new
        return new

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        for n in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:n]):
                return n
        return 0
