"""Small language models made here from nothing: for figures, demos and tests without a download.

The result is an ordinary transformers model and tokenizer, over single characters; a supervised
warm start on solutions gives a policy that RL can improve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saltire.errors import SaltireError
from saltire.progress import track
from saltire.rl.policy import Policy, Sequences, pack
from saltire.rl.prompts import Codec
from saltire.rl.tasks import Task

ARITHMETIC_CHARACTERS = "0123456789+-*/()=: "


def character_tokenizer(characters: str = ARITHMETIC_CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character, after ``<pad>`` 0, ``<s>`` 1, ``</s>`` 2 and ``<unk>`` 3."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *dict.fromkeys(characters)])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def small_model(
    vocabulary: int, hidden: int = 96, layers: int = 3, heads: int = 4, seed: int = 0
) -> LlamaForCausalLM:
    """A Llama with random weights: D = ``hidden``, an MLP of 3·D, tied embeddings, float32."""
    if hidden % heads or (hidden // heads) % 2:
        raise SaltireError(
            f"small model: hidden {hidden} over {heads} heads; each head needs an even width."
        )
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def supervise(
    policy: Policy,
    prompts: Sequence[list[int]],
    solutions: Sequence[list[int]],
    *,
    steps: int,
    batch: int = 128,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> float:
    """Train on solutions by cross-entropy; return the mean loss (nats per token) of the last tenth.

    AdamW with a cosine down to zero; the batches are a pure function of ``seed``.
    """
    optimiser = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    rng = np.random.default_rng(seed)
    losses = []
    for _ in track(range(steps), "supervised warm start"):
        chosen = rng.integers(0, len(prompts), batch)
        sequences: Sequences = pack(
            [prompts[i] for i in chosen], [solutions[i] for i in chosen], pad=0
        )
        logprob, _ = policy(sequences.to(next(policy.parameters()).device))
        loss = -logprob.mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def taught_model(
    task: Task, *, steps: int, hidden: int = 64, layers: int = 2, seed: int = 0
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A small model that has been shown the ``solution`` of every row, and its tokenizer."""
    tokenizer = character_tokenizer()
    model = small_model(len(tokenizer), hidden=hidden, layers=layers, seed=seed)
    codec = Codec(tokenizer)
    supervise(
        Policy(model),
        [codec.encode(task.prompt(row)) for row in task.rows],
        [
            [*tokenizer.encode(row["solution"], add_special_tokens=False), *codec.stop]
            for row in task.rows
        ],
        steps=steps,
        seed=seed,
    )
    return model, tokenizer
