"""A model rounded in seconds: near its weights, and good enough to draft for itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from saltire.decode import ModelDraft, Session
from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder
from saltire.models.rounding import round_linear, rounded_decoder
from saltire.nn.linear_format import LinearFormat
from tests.tiny import random_tokens, tiny_model


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.08), (2, 0.4)])
def test_rounded_weights_are_near_the_weights(bits: int, bound: float) -> None:
    module = nn.Linear(64, 48)
    format = LinearFormat(
        weight_bits=bits, act_bits=8, group=32, zero_points=True, scale_dtype="float16"
    )
    rounded = round_linear(module, format)
    lost = rounded.dequantized_weight().float() - module.weight
    assert lost.norm() / module.weight.norm() < bound
    # Half a step of each group's own grid, for what its grid covers.
    plain = module.weight.view(48, -1, 32)
    step = (plain.amax(-1) - plain.amin(-1)) / (2**bits - 1)
    assert (lost.view(48, -1, 32).square().mean(-1) <= (step / 2).square()).all()
    assert torch.equal(rounded.bias, module.bias)


def test_a_rounded_draft_mostly_agrees_with_its_model_and_changes_nothing() -> None:
    model = tiny_model("llama")
    decoder = build_decoder(model)
    prompt = random_tokens(model, 1, 12)[0].tolist()
    session = Session(decoder, {"rounded": ModelDraft(rounded_decoder(model))}, fixed=3)
    out = session.generate([prompt], 40)
    assert out.tokens == Session(decoder).generate([prompt], 40).tokens
    assert out.stats.acceptance > 0.5


def test_a_width_that_the_group_does_not_divide_is_refused() -> None:
    with pytest.raises(SaltireError, match="K = 80 inputs; expected a multiple of 32"):
        rounded_decoder(tiny_model("llama", intermediate_size=80))
