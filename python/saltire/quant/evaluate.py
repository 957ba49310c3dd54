"""Measuring a model: perplexity, and tokens per second through transformers."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saltire.errors import SaltireError
from saltire.models.cache_argument import cache_argument
from saltire.progress import track
from saltire.quant.float32_sums import float32_sums
from saltire.quant.texts import evaluation_tokens

LOGIT_CHUNK = 256  # tokens whose logits are turned into float32 log-probabilities at once
PATIENCE = 10.0  # seconds after which a timing begins no other run


@dataclass(frozen=True)
class Perplexity:
    """value = exp(nll); nll in nats a token, the mean over ``tokens`` predicted tokens."""

    value: float
    nll: float
    tokens: int


@dataclass(frozen=True)
class Speed:
    """Tokens per second, medians; the spread is the interquartile range over the median."""

    prefill: float
    decode: float
    decode_spread: float


@torch.no_grad()
def perplexity(model: Any, tokens: Tensor, label: str = "measuring perplexity") -> Perplexity:
    """Perplexity over windows, each predicted from its own start.

    tokens: int64 [windows, T], T >= 2. The first token of a window is not predicted. Raises
    SaltireError if a loss is not finite, naming the window.
    """
    if tokens.dim() != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise SaltireError(f"tokens are {list(tokens.shape)}; expected [windows, T], T at least 2.")
    total = 0.0
    for index, window in enumerate(track(tokens, label)):
        window = window.to(model.device)
        with float32_sums(model):
            logits = model(window[None], use_cache=False).logits[0, :-1]
        loss = sum(
            float(torch.nn.functional.cross_entropy(part.float(), label_part, reduction="sum"))
            for part, label_part in zip(
                logits.split(LOGIT_CHUNK), window[1:].split(LOGIT_CHUNK), strict=True
            )
        )
        if not math.isfinite(loss):
            raise SaltireError(f"the loss of window {index} is {loss}; the model is damaged.")
        total += loss
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    nll = total / count
    return Perplexity(math.exp(nll), nll, count)


@torch.no_grad()
def measure_speed(
    model: Any, prompt: Tensor, new_tokens: int = 32, repeats: int = 3, label: str = "timing"
) -> Speed:
    """Prefill of a prompt and greedy decoding after it, through transformers' forward and cache.

    prompt: int64 [T]. Prefill counts T tokens over one forward that gives the last logits; decode
    counts tokens one by one. One warm-up run, then medians over ``repeats`` runs, or over
    fewer once 10 s are spent.
    """
    begin = time.perf_counter()
    prompt, cache = prompt[None].to(model.device), cache_argument(model)
    prefills: list[float] = []
    steps: list[float] = []
    for repeat in track(range(repeats + 1), label):
        start = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        seconds = [time.perf_counter() - start]
        for _ in range(new_tokens if repeat else 2):
            step = out.logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            out = model(step, use_cache=True, **{cache: out[cache]})
            seconds.append(time.perf_counter() - start)
        if repeat:
            prefills.append(seconds[0])
            steps.extend(seconds[1:])
            if time.perf_counter() - begin > PATIENCE:
                break
    low, middle, high = statistics.quantiles(steps, n=4)
    return Speed(
        prefill=prompt.shape[1] / statistics.median(prefills),
        decode=1.0 / middle,
        decode_spread=(high - low) / middle,
    )


def measured(
    model: Any, tokenizer: Any, text: str, windows: int, length: int, speed: bool
) -> dict[str, float]:
    """What ``saltire eval`` tells of a model: perplexity of windows of a text, megabytes, speed."""
    tokens = evaluation_tokens(text, tokenizer, windows=windows, length=length)
    result = perplexity(model, tokens)
    facts: dict[str, float] = {
        "perplexity": result.value,
        "nll": result.nll,
        "tokens": result.tokens,
        "megabytes": megabytes(model),
    }
    if speed:
        timing = measure_speed(model, tokens.flatten()[:512])
        facts |= {
            "prefill_tok_s": timing.prefill,
            "decode_tok_s": timing.decode,
            "decode_spread": timing.decode_spread,
        }
    return facts


def megabytes(model: Any) -> float:
    """Bytes of the tensors that a checkpoint holds, a tied one once, in MB of 10^6."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values()) / 1e6
