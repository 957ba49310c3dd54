"""Texts to calibrate on and to measure with: files, data sets, Python's help, the model itself."""

from __future__ import annotations

import json
import pydoc_data.topics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saltire.errors import MissingExtraError, SaltireError
from saltire.models.cache_argument import cache_argument
from saltire.models.decoder import build_decoder
from saltire.progress import track
from saltire.quant.finite import all_finite

AT_ONCE = 32  # texts that a model writes side by side: a cache for all would not fit
MAX_CHARACTERS = 20_000_000  # read of one source: far more than any calibration needs

# First words of sampled text, from several registers, so that samples do not all begin alike.
OPENINGS = (
    "The", "In", "When", "A", "How", "Once upon a time", "According to", "def", "import",
    "Dear", "Chapter 1", "Question:", "1.", "However,", "She", "They", "It was", "To",
)  # fmt: skip


def calibration_tokens(
    source: str,
    model: Any,
    tokenizer: Any,
    *,
    samples: int = 16,
    length: int = 512,
    seed: int = 0,
) -> Tensor:
    """Tokens to calibrate on: int64 [samples, length].

    source: ``"self"``, text sampled from the model at temperature 1, which needs no data and shows
    the model what it will see of itself; or as for ``source_text``, of which windows are drawn at
    random. Raises SaltireError if the text is too short for one window.
    """
    if samples < 1 or length < 2:
        raise SaltireError(
            f"samples = {samples}, length = {length}; expected at least 1 sample of 2 tokens."
        )
    if source == "self":
        return sample_from_model(model, tokenizer, samples, length, seed)
    ids = tokenize(source_text(source), tokenizer, source, least=length)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length + 1, (samples,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def evaluation_tokens(source: str, tokenizer: Any, *, windows: int, length: int) -> Tensor:
    """Windows spread evenly over a text: int64 [windows, length].

    source: as for ``source_text``; ``"pydoc"`` is the prose of Python's own help topics, which is
    there without a network. Fewer windows come back where the text has no more that do not overlap.
    """
    if windows < 1 or length < 2:
        raise SaltireError(
            f"windows = {windows}, length = {length}; expected at least 1 window of 2 tokens."
        )
    ids = tokenize(source_text(source), tokenizer, source, least=length)
    windows = min(windows, len(ids) // length)
    step = (len(ids) - length) / max(1, windows - 1)
    return torch.stack([ids[int(i * step) : int(i * step) + length] for i in range(windows)])


def source_text(source: str) -> str:
    """The text of a source: ``"pydoc"``, a ``.jsonl`` file (key ``text``), another text file, or a
    Hugging Face data set (``name`` or ``name:configuration:split``; extra ``data``).

    Raises SaltireError for a source that is missing, empty or not text.
    """
    if source == "pydoc":
        return "\n\n".join(pydoc_data.topics.topics.values())
    path = Path(source)
    if path.is_dir():
        raise SaltireError(f"{source} is a directory; expected a text or .jsonl file.")
    if path.is_file():
        text = "\n\n".join(_lines(path)) if path.suffix == ".jsonl" else _read(path)
    elif path.suffix in (".txt", ".jsonl", ".md", ".json") or source.startswith((".", "/", "~")):
        raise SaltireError(f"there is no file {source}.")
    else:
        text = "\n\n".join(_dataset(source))
    if not text.strip():
        raise SaltireError(f"{source} holds no text. Give a file with some pages of prose.")
    return text


def tokenize(text: str, tokenizer: Any, source: str, least: int) -> Tensor:
    """Token ids of a text, int64 [n]; SaltireError if there are fewer than ``least``."""
    if tokenizer is None:
        raise SaltireError("a tokenizer is needed to read text; give one, or give tokens instead.")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < least:
        raise SaltireError(
            f"{source} has {len(ids)} tokens; expected at least {least}. "
            "Give a longer text or a smaller length."
        )
    return ids


@torch.no_grad()
def sample_from_model(model: Any, tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """Text that the model writes at temperature 1 from short openings: int64 [samples, length].

    An end-of-text token does not end a sample: the model goes on with another text, as it was
    trained to. Raises SaltireError for a model whose logits are NaN or infinite.
    """
    if tokenizer is None:
        raise SaltireError("sampling from the model needs its tokenizer; give one, or give tokens.")
    generator = torch.Generator().manual_seed(seed)
    prefix = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    rows = []
    for index in range(samples):
        opening = OPENINGS[index % len(OPENINGS)]
        rows.append(prefix + tokenizer(opening, add_special_tokens=False)["input_ids"])
    short = min(min(map(len, rows)), length - 1)  # openings are cut to one length
    openings = torch.tensor([row[:short] for row in rows])
    written = []
    for number, part in enumerate(openings.split(AT_ONCE), 1):
        tokens = step = part
        after = _logits_after(model, len(part), length)
        batch = f", batch {number} of {-(-samples // AT_ONCE)}" if samples > AT_ONCE else ""
        for _ in track(range(length - short), f"sampling calibration text{batch}"):
            probabilities = after(step).float().softmax(-1).cpu()
            if not all_finite(probabilities):  # one bad logit makes all of its row NaN
                raise SaltireError(
                    f"the model cannot write its own calibration text: after {tokens.shape[1]} "
                    "tokens its logits hold NaN or infinity. Check the model's files; another "
                    "text would meet the same."
                )
            step = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, step], dim=1)
        written.append(tokens)
    return torch.cat(written)


def _logits_after(model: Any, samples: int, length: int) -> Callable[[Tensor], Tensor]:
    """A function from the next tokens of every text, [samples, n], to the logits after them.

    Our own decoder on a CPU, three times as fast, where it can run the model.
    """
    try:
        decoder = build_decoder(model) if model.device.type == "cpu" else None
    except SaltireError:
        decoder = None
    if decoder is not None:
        slots = decoder.new_cache(samples, length)

        def ours(tokens: Tensor) -> Tensor:
            run = decoder.step if tokens.shape[1] == 1 else decoder.prefill
            return run(slots, tokens.tolist()).logits

        return ours
    name, cache = cache_argument(model), None

    def theirs(tokens: Tensor) -> Tensor:
        nonlocal cache
        out = model(tokens.to(model.device), use_cache=True, logits_to_keep=1, **{name: cache})
        cache = out[name]
        return out.logits[:, -1]

    return theirs


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS)
    except UnicodeDecodeError as error:
        raise SaltireError(f"{path} is not UTF-8 text (byte {error.start}). Convert it.") from None
    except OSError as error:
        raise SaltireError(f"cannot read {path}: {error.strerror}.") from None
    if "\0" in text:
        raise SaltireError(f"{path} is not text: it holds zero bytes.")
    return text


def _lines(path: Path) -> Iterator[str]:
    text = _read(path)
    if len(text) == MAX_CHARACTERS:
        text = text.rpartition("\n")[0]  # the last line may be cut off
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SaltireError(f"{path}, line {number}: not JSON ({error.msg}).") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise SaltireError(f'{path}, line {number}: expected an object with a string "text".')
        yield row["text"]


def _dataset(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise MissingExtraError("datasets", "data", f"{name!r} is no file; a data set") from None
    repository, _, rest = name.partition(":")
    configuration, _, split = rest.partition(":")
    try:
        rows = load_dataset(
            repository, configuration or None, split=split or "train", streaming=True
        )
        count = 0
        for row in track(rows, f"reading {name}"):
            if not isinstance(row.get("text"), str):
                raise SaltireError(f'{name}: rows have {sorted(row)}; expected a column "text".')
            count += len(row["text"])
            yield row["text"]
            if count > MAX_CHARACTERS:
                return
    except SaltireError:
        raise
    except Exception as error:
        raise SaltireError(
            f"{name!r} is neither a file nor a data set that can be loaded: {error}"
        ) from None
