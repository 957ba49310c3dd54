"""Drafting in one call: the tokens that steps by hand would give, ended where it was asked to."""

from __future__ import annotations

import pytest
import torch

from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder
from saltire.nn.decoder import Decoder
from saltire.nn.kv_cache import KVCache
from saltire.ops.decoder_layer import CONFIDENCE_BINS
from tests.tiny import random_tokens, tiny_model

ALL_STAND = torch.ones(CONFIDENCE_BINS)


def prefilled(decoder: Decoder, prompts: list[list[int]]) -> KVCache:
    cache = decoder.new_cache(len(prompts), 48)
    decoder.prefill(cache, prompts)
    return cache


def by_hand(
    decoder: Decoder, cache: KVCache, sequence: int, token: int, count: int, vocabulary: int
) -> tuple[list[int], list[float]]:
    tokens, shares = [], []
    for slot in range(cache.lengths[sequence], cache.lengths[sequence] + count):
        rows = [[token, sequence, slot, slot, slot + 1, 0]]
        logits = decoder.step_rows(cache, rows, [0]).logits[0, :vocabulary]
        token = int(logits.argmax())
        tokens.append(token)
        shares.append(float(torch.softmax(logits, 0)[token]))
    return tokens, shares


@pytest.mark.parametrize("vocabulary", [0, 40])
def test_drafts_are_what_single_steps_give(vocabulary: int, isa: str) -> None:
    decoder = build_decoder(tiny_model("qwen3"))
    prompts = [
        row[:n].tolist()
        for row, n in zip(random_tokens(tiny_model("qwen3"), 3, 20), (20, 3, 11), strict=True)
    ]
    cache = prefilled(decoder, prompts)
    wanted = [5, 0, 2]
    starts = [[7 + b, b, cache.lengths[b], most] for b, most in enumerate(wanted)]
    tokens, shares = decoder.draft(cache, starts, ALL_STAND, head_outputs=vocabulary)
    assert cache.lengths == [20, 3, 11]
    for b, most in enumerate(wanted):
        expected, sure = by_hand(decoder, cache, b, 7 + b, most, vocabulary or 128)
        assert tokens[b] == expected
        torch.testing.assert_close(torch.tensor(shares[b]), torch.tensor(sure))


def test_an_unsure_draft_is_kept_and_is_the_last() -> None:
    decoder = build_decoder(tiny_model("llama"))
    cache = prefilled(decoder, [[5, 9, 11]])
    [tokens], [shares] = decoder.draft(cache, [[4, 0, 3, 20]], ALL_STAND)
    assert len(tokens) == 20
    bound = sorted(shares)[4]
    [fewer], _ = decoder.draft(cache, [[4, 0, 3, 20]], ALL_STAND, confidence=bound)
    first = next(i for i, share in enumerate(shares) if share < bound)
    assert fewer == tokens[: first + 1]


def test_drafting_ends_where_its_chances_are_worth_too_little() -> None:
    decoder = build_decoder(tiny_model("llama"))
    cache = prefilled(decoder, [[5, 9, 11]])
    survival = torch.linspace(0.3, 0.95, CONFIDENCE_BINS)
    [tokens], [shares] = decoder.draft(cache, [[4, 0, 3, 20]], survival)
    chance, expected = 1.0, 0
    for share in shares:
        expected += 1
        chance *= float(survival[min(int(share * CONFIDENCE_BINS), CONFIDENCE_BINS - 1)])
        if chance < 0.2:
            break
    [fewer], _ = decoder.draft(cache, [[4, 0, 3, 20]], survival, worth=0.2)
    assert fewer == tokens[:expected]
    assert expected < 20


def test_a_draft_with_layers_left_out_is_that_model() -> None:
    decoder = build_decoder(tiny_model("llama", num_hidden_layers=4))
    cache = prefilled(decoder, [[5, 9, 11]])
    units = decoder.all_units.clone()
    units[1] = 0
    [tokens], _ = decoder.draft(cache, [[4, 0, 3, 3]], ALL_STAND, units)
    slot, token, expected = 3, 4, []
    for _ in range(3):
        rows = [[token, 0, slot, slot, slot + 1, 0]]
        token = int(decoder.step_rows(cache, rows, [0], units).best[0])
        expected.append(token)
        slot += 1
    assert tokens == expected


def test_refusals_say_what_to_do() -> None:
    decoder = build_decoder(tiny_model("llama"))
    cache = prefilled(decoder, [[5, 9, 11]])
    with pytest.raises(SaltireError, match=r"asks for 46 drafts from slot 3 on; .* has 48 slots"):
        decoder.draft(cache, [[4, 0, 3, 46]], ALL_STAND)
    with pytest.raises(SaltireError, match="token 128; the vocabulary has 128"):
        decoder.draft(cache, [[128, 0, 3, 2]], ALL_STAND)
    with pytest.raises(SaltireError, match=r"survival is float32 \[3\]; expected float32 \[16\]"):
        decoder.draft(cache, [[4, 0, 3, 2]], torch.ones(3))
    other = build_decoder(tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(SaltireError, match="belongs to another model"):
        other.draft(cache, [[4, 0, 3, 2]], ALL_STAND)


def test_the_op_keeps_its_schemas_promises() -> None:
    decoder = build_decoder(tiny_model("llama"))
    cache = prefilled(decoder, [[5, 9, 11]])
    kv, scales = cache.state()
    arguments = (
        decoder._handle,
        kv,
        scales,
        decoder._rotation_for(cache.slots),
        torch.tensor([[4, 0, 3, 2]]),
        decoder.all_units,
        ALL_STAND,
        4,
        0.0,
        0.0,
        0,
    )
    torch.library.opcheck(
        torch.ops.saltire.decoder_draft.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )
