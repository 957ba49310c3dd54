"""From a transformers model to a session, by the names that the command line uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from saltire.decode.drafts import Draft, ModelDraft, NgramDraft
from saltire.decode.plan import SkipPlanner
from saltire.decode.sampling import Sampling
from saltire.decode.session import Session
from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder
from saltire.models.rounding import rounded_decoder
from saltire.nn.decoder import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRIMMED_FROM = 32000  # tokens of a vocabulary whose second half drafts do without
EXIT = 0.7  # the paper's threshold of confidence at which drafting stops
DRAFTS = ("none", "ngram", "clasp", "quantised", "auto")


def open_session(
    model: PreTrainedModel,
    draft: str = "none",
    draft_model: PreTrainedModel | Decoder | Literal["rounded"] | None = None,
    skip: int = 0,
    halves: bool = False,
    interval: int = 64,
    length: int = 0,
    cache_dtype: torch.dtype | None = None,
) -> Session:
    """A session on a model that transformers has loaded on the CPU.

    draft: ``none``; ``ngram`` (prompt lookup); ``clasp`` (the model with layers skipped, planned
    while decoding); ``quantised`` (``draft_model``, a low-bit form of the same model); ``auto``
    (all that are there, chosen by predicted tokens per unit of time). draft_model: ``rounded``
    makes one here, in some seconds (``saltire.models.rounding``). skip: layers that CLaSp
    leaves out (0: a quarter), or half layers with ``halves``. interval: verifications between two
    plans.
    length: always draft so many; 0 chooses. Raises SaltireError for what cannot run.
    """
    if draft not in DRAFTS:
        raise SaltireError(f"draft = {draft!r}; expected one of {', '.join(DRAFTS)}.")
    if interval < 1:
        raise SaltireError(f"interval = {interval}; expected at least 1 verification.")
    decoder = build_decoder(model)
    drafts: dict[str, Draft] = {}
    planned: dict[str, int] = {}
    planner = None
    if draft in ("ngram", "auto"):
        drafts["ngram"] = NgramDraft()
    cheap = None
    if draft == "quantised" or (draft == "auto" and draft_model is not None):
        if draft_model is None or draft_model == "rounded":
            cheap = rounded_decoder(model)
        elif isinstance(draft_model, Decoder):
            cheap = draft_model
        else:
            cheap = build_decoder(draft_model)
        vocabulary = cheap.sizes.vocabulary // 2 if cheap.sizes.vocabulary >= TRIMMED_FROM else 0
        drafts["quantised"] = ModelDraft(cheap, vocabulary=vocabulary)
    if draft in ("clasp", "auto"):
        steps = decoder.layers * (2 if halves else 1)
        planned["clasp"] = skip or max(1, steps // 4)
        planner = SkipPlanner(decoder, planned["clasp"], halves)
        drafts["clasp"] = ModelDraft(decoder, decoder.all_units, confidence=EXIT)
        if cheap is not None:
            planned["quantised+clasp"] = 1
            drafts["quantised+clasp"] = ModelDraft(cheap, cheap.all_units, vocabulary=vocabulary)
    return Session(decoder, drafts, planner, planned, interval, cache_dtype, length)


def custom_generate(session: Session) -> Callable[..., Any]:
    """For ``model.generate(..., custom_generate=custom_generate(session))``.

    Greedy and sampled generation with temperature, top-k, top-p, min-p, repetition penalty and EOS
    as the generation config has them; left-padded batches. Anything else in the config that would
    change the output is refused by name.
    """

    def run(
        model: Any,
        input_ids: Tensor,
        *,
        generation_config: Any,
        streamer: Any = None,
        **rest: Any,  # not by name: transformers would then pass the mask twice
    ) -> Tensor:
        config, attention_mask = generation_config, rest.get("attention_mask")
        for name, plain in (("num_beams", 1), ("num_return_sequences", 1), ("typical_p", 1.0)):
            value = getattr(config, name, None)
            if value not in (None, plain):
                raise SaltireError(f"{name} = {value}; the decoder generates with {plain} only.")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [row[on.bool()].tolist() for row, on in zip(input_ids, mask, strict=True)]
        eos = config.eos_token_id
        stop = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        longest = config.max_length - input_ids.shape[1]
        if streamer is not None:
            streamer.put(input_ids.cpu())

        def show(_: int, tokens: list[int]) -> None:
            if streamer is not None:
                streamer.put(torch.tensor(tokens))

        out = session.generate(prompts, longest, _sampling(config), stop, show)
        if streamer is not None:
            streamer.end()
        width = max(len(tokens) for tokens in out.tokens)
        pad = config.pad_token_id if config.pad_token_id is not None else (stop or [0])[0]
        new = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens in out.tokens])
        return torch.cat([input_ids, new.to(input_ids.dtype)], dim=1)

    return run


def _sampling(config: Any) -> Sampling:
    penalty = config.repetition_penalty or 1.0
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        temperature=1.0 if config.temperature is None else config.temperature,
        top_k=config.top_k or 0,
        top_p=1.0 if config.top_p is None else config.top_p,
        min_p=config.min_p or 0.0,
        repetition_penalty=penalty,
        seed=int(torch.randint(1 << 62, ())),  # follows torch.manual_seed, as transformers does
    )
