"""Our decoder as the rollout: the completions of transformers, from the weights in training."""

from __future__ import annotations

import pytest
import torch

from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder
from saltire.rl.config import LoraConfig, RolloutConfig
from saltire.rl.decoder_rollout import DecoderRollout, merge_lora
from saltire.rl.engines import plain_copy, runs_on_decoder
from saltire.rl.lora import LoraLinear, add_lora
from saltire.rl.rollout import uniform_numbers
from saltire.rl.scratch import character_tokenizer, small_model
from tests.rl.small import EOS, rollout_of, small_policy, some_prompts


def decoder_of(model, batch: int = 64) -> DecoderRollout:
    return DecoderRollout(build_decoder(model), [EOS], batch)


def small(seed: int = 0):
    return small_model(len(character_tokenizer()), hidden=64, layers=2, heads=4, seed=seed)


@pytest.mark.parametrize("batch", [64, 5, 1])
def test_completions_are_those_of_transformers_in_any_batch(batch) -> None:
    model = small()
    # Groups of the same prompt, one longer than a block of the cache, and some of them to stop.
    prompts = [p for p in [*some_prompts(5), [1, *range(4, 21)]] for _ in range(3)]
    numbers = uniform_numbers(3, 0, range(len(prompts)), 12)
    policy = small_policy()
    policy.model = model
    wanted = rollout_of(policy)(prompts, numbers, 0.8)
    assert decoder_of(model, batch)(prompts, numbers, 0.8) == wanted
    assert any(len(completion) < 12 for completion in wanted)


def test_a_trained_weight_is_used_at_once() -> None:
    model = small()
    rollout = decoder_of(model)
    prompts, numbers = some_prompts(6), uniform_numbers(0, 0, range(6), 8)
    before = rollout(prompts, numbers, 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(small(seed=1).get_parameter("model.norm.weight").new_ones(())
                            if parameter.dim() == 1 else parameter.flip(0))  # fmt: skip
    after = rollout(prompts, numbers, 1.0)
    assert after == decoder_of(model)(prompts, numbers, 1.0) != before


def test_adapters_are_merged_into_the_copy_and_the_rest_is_shared() -> None:
    model = small()
    config = LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    plain = plain_copy(model, config)
    add_lora(model, config, seed=0)
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            torch.nn.init.normal_(layer.lora_B, std=0.5)
    merge_lora(model, plain)
    prompts, numbers = some_prompts(6), uniform_numbers(0, 0, range(6), 8)
    policy = small_policy()
    policy.model = model
    assert decoder_of(plain)(prompts, numbers, 1.0) == rollout_of(policy)(prompts, numbers, 1.0)
    assert plain.get_input_embeddings().weight.data_ptr() == (
        model.get_input_embeddings().weight.data_ptr()
    )


def test_weights_that_cannot_be_shared_fall_back_or_are_refused() -> None:
    model = small().to(torch.bfloat16)
    assert not runs_on_decoder(RolloutConfig(engine="auto"), model)
    assert runs_on_decoder(RolloutConfig(engine="auto"), small())
    assert not runs_on_decoder(RolloutConfig(engine="transformers"), small())
    with pytest.raises(SaltireError, match=r"bfloat16.*Set rollout\.engine"):
        runs_on_decoder(RolloutConfig(engine="decoder"), model)
    with pytest.raises(SaltireError, match="head_dim"):  # 8, no multiple of 16
        runs_on_decoder(RolloutConfig(engine="decoder"), small_policy().model)


def test_diverged_weights_and_a_missing_end_are_named() -> None:
    model = small()
    with pytest.raises(SaltireError, match="no end-of-sequence"):
        DecoderRollout(build_decoder(model), [])
    with torch.no_grad():
        model.get_input_embeddings().weight[4:] = torch.nan
    with pytest.raises(SaltireError, match="logits of sequence 0 are not finite at its token 0"):
        decoder_of(model)([[4]], uniform_numbers(0, 0, [0], 2), 1.0)
