"""The head that gives the logits: quantised gently, to the bits that the recipe names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from saltire.errors import SaltireError
from saltire.nn.quant_linear import QuantLinear
from saltire.quant import RECIPES, quantize
from saltire.quant.recipe import Learning
from tests.tiny import random_tokens, tiny_model


@torch.no_grad()
def test_the_head_has_the_bits_that_are_asked_for_and_more_of_them_lose_less() -> None:
    tokens = random_tokens(tiny_model("llama"), 8, 32)
    want = tiny_model("llama")(tokens).logits
    errors = {}
    for bits in (4, 8, 16):
        # Blocks in 8 bits, so that the error is the head's.
        model = quantize(
            tiny_model("llama"), None, replace(RECIPES["w8a8"], head_bits=bits), tokens, batch=4
        )
        head = model.lm_head
        if bits == 16:
            assert type(head) is nn.Linear
        else:
            assert isinstance(head, QuantLinear)
            # Groups, where they fit, for the coarse one alone.
            assert (head.format.weight_bits, head.format.act_bits) == (bits, 8)
            assert head.format.group == (64 if bits == 4 else 0)
        errors[bits] = float((model(tokens).logits - want).norm() / want.norm())
    assert errors[4] > 2 * errors[8]
    assert errors[8] > errors[16] > 0


def test_other_bits_are_refused() -> None:
    with pytest.raises(SaltireError, match="head_bits = 2; expected 16, or one of 4, 8"):
        replace(RECIPES["w4a4"], head_bits=2)


def test_a_head_is_rounded_in_closed_form_whatever_the_blocks_learn() -> None:
    learned = replace(RECIPES["w4a4"], learning=Learning(group_steps=5, epochs=1))
    for recipe in (learned, replace(RECIPES["w4a4"], transform="kronecker")):
        head = recipe.head_recipe(64)
        assert (head.learning, head.transform) == (None, "bdq")
    tokens = random_tokens(tiny_model("llama"), 8, 32)
    model = quantize(tiny_model("llama"), None, learned, tokens, batch=4)
    assert model.lm_head.right is None
    assert model.model.layers[0].mlp.gate_proj.right is not None
