"""Generation: equal to transformers' greedy, lossless under every draft, and safe on bad input."""

from __future__ import annotations

import pytest
import torch

from saltire.decode import (
    Guide,
    ModelDraft,
    NgramDraft,
    Sampling,
    Session,
    SkipPlanner,
    custom_generate,
    open_session,
)
from saltire.errors import SaltireError
from saltire.models.decoder import build_decoder
from saltire.nn.decoder import Decoder
from saltire.ops.decoder_layer import ATTENTION, MLP
from tests.tiny import ARCHITECTURES, random_tokens, tiny_model

WHOLE = ATTENTION | MLP


def prompts_of(model, *lengths: int) -> list[list[int]]:
    tokens = random_tokens(model, len(lengths), max(lengths))
    return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


@torch.no_grad()
def transformers_greedy(model, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def skipping(decoder: Decoder, *layers: int) -> ModelDraft:
    units = decoder.all_units.clone()
    units[list(layers)] = 0
    return ModelDraft(decoder, units, confidence=0.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_generation_is_transformers_greedy(architecture: str) -> None:
    model = tiny_model(architecture)
    [prompt] = prompts_of(model, 12)
    session = open_session(model)
    out = session.generate([prompt], 40, stop=[2])
    assert out.tokens[0] == transformers_greedy(model, prompt, 40)
    assert out.stats.tokens_per_step == pytest.approx(1.0)


@pytest.mark.parametrize("draft", ["ngram", "clasp", "quantised", "skip", "auto"])
@pytest.mark.parametrize("fixed", [0, 3])
def test_greedy_speculation_emits_the_plain_sequence(draft: str, fixed: int) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    prompts = prompts_of(model, 9, 21, 4)
    plain = open_session(model).generate(prompts, 50)
    if draft == "skip":
        decoder = build_decoder(model)
        session = Session(decoder, {"skip": skipping(decoder, 1, 2)}, fixed=fixed)
    else:
        cheap = "rounded" if draft == "auto" else None
        session = open_session(model, draft, cheap, interval=4, length=fixed)
    for _ in range(2):  # the second time with what was learnt
        out = session.generate(prompts, 50)
        assert out.tokens == plain.tokens
    if fixed:
        assert sum(out.stats.offered.values()) > 0


def test_a_draft_that_is_the_target_is_always_accepted() -> None:
    decoder = build_decoder(tiny_model("qwen3"))
    session = Session(decoder, {"same": ModelDraft(decoder, confidence=0.0)}, fixed=4)
    for sampling in (Sampling(), Sampling(temperature=1.0, seed=3)):
        out = session.generate([[5, 6, 7]], 41, sampling)
        assert out.stats.acceptance == 1.0
        assert out.stats.steps == 8  # 40 behind the prefill's, five a round


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_sampled_speculation_has_the_plain_distribution(penalty: float) -> None:
    """The third token over many seeds, by chi-square against exact enumeration."""
    model = tiny_model("llama", vocab_size=8, num_hidden_layers=3, initializer_range=0.4)
    decoder = build_decoder(model)
    prompt, n, V = [3, 4, 5], 3000, 8
    settings = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": penalty}
    sampling = Sampling(**settings)

    def distribution(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1:].float()
        return sampling.probabilities(sampling.penalise(logits, [tokens]))[0].double()

    expected = torch.zeros(V, dtype=torch.float64)
    first = distribution(prompt)
    for a in range(V):
        second = distribution([*prompt, a])
        for b in range(V):
            if first[a] * second[b] > 0:
                expected += first[a] * second[b] * distribution([*prompt, a, b])
    session = Session(decoder, {"skip": skipping(decoder, 1)}, fixed=2)
    counts = torch.zeros(V, dtype=torch.float64)
    batch = [prompt] * 8
    for seed in range(n // 8):
        out = session.generate(batch, 3, Sampling(**settings, seed=seed))
        for tokens in out.tokens:
            counts[tokens[2]] += 1
    seen = expected > 0
    assert counts[~seen].sum() == 0
    chi = ((counts - n * expected)[seen] ** 2 / (n * expected[seen])).sum()
    assert chi < 24.4  # at most 7 degrees of freedom, p = 0.001


def test_a_batch_gives_what_each_prompt_gives_alone() -> None:
    model = tiny_model("mistral")
    prompts = prompts_of(model, 5, 17)
    session = open_session(model, "ngram", length=2)
    together = session.generate(prompts, 30)
    for prompt, tokens in zip(prompts, together.tokens, strict=True):
        assert session.generate([prompt], 30).tokens[0] == tokens


def test_ngrams_repeat_what_followed() -> None:
    draft = NgramDraft()
    text = [1, 2, 3, 4, 9, 2, 3, 8, 1, 2, 3]
    assert draft.matched(0, text) == (3, 3)  # the longest match, not the latest
    assert draft.matched(0, [*text, 7]) == (0, 0)
    assert draft.matched(1, [1, 2]) == (0, 0)
    guide = Guide([4])
    assert draft.propose(None, [text], guide, Sampling()).tokens == [[4, 9, 2, 3]]
    # What repeats goes on past the end of the text.
    assert draft.propose(None, [[5, 6, 5, 6]], guide, Sampling()).tokens == [[5, 6, 5, 6]]


def test_stop_tokens_callbacks_and_budget_end_a_sequence() -> None:
    model = tiny_model("llama")
    session = open_session(model, "ngram", length=3)
    [prompt] = prompts_of(model, 8)
    free = session.generate([prompt], 24).tokens[0]
    stopped = session.generate([prompt], 24, stop=[free[5]]).tokens[0]
    assert stopped == free[: free.index(free[5]) + 1]
    got: list[int] = []

    def take(_: int, tokens: list[int]) -> bool:
        got.extend(tokens)
        return len(got) >= 7

    out = session.generate([prompt], 24, on_tokens=take).tokens[0]
    assert out == got == free[: len(got)]
    assert session.generate([prompt], 0).tokens == [[]]
    assert session.generate([prompt], 1).tokens == [free[:1]]


def test_an_interrupt_keeps_the_text_and_the_session() -> None:
    model = tiny_model("llama")
    session = open_session(model)
    [prompt] = prompts_of(model, 8)
    free = session.generate([prompt], 20).tokens[0]
    seen = 0

    def interrupt(_: int, tokens: list[int]) -> None:
        nonlocal seen
        seen += len(tokens)
        if seen == 6:
            raise KeyboardInterrupt

    out = session.generate([prompt], 20, on_tokens=interrupt)
    assert out.interrupted
    assert out.tokens[0] == free[:6]
    assert session.generate([prompt], 20).tokens[0] == free


def test_transformers_generate_can_be_ours() -> None:
    model = tiny_model("qwen2")
    [prompt] = prompts_of(model, 11)
    ids = torch.tensor([prompt])
    session = open_session(model, "ngram")
    keywords = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 25, "do_sample": False}
    ours = model.generate(ids, custom_generate=custom_generate(session), **keywords)
    assert torch.equal(ours, model.generate(ids, **keywords))


@pytest.mark.parametrize("halves", [False, True])
def test_plans_follow_the_programme_of_the_reference(halves: bool) -> None:
    from saltire.reference.skip_plan import plan as reference_plan

    model = tiny_model("llama", num_hidden_layers=5)
    decoder = build_decoder(model)
    planner = SkipPlanner(decoder, 4, halves)
    tokens = prompts_of(model, 15)[0]
    cache = decoder.new_cache(1, 32)
    trace = planner.trace(1)
    decoder.prefill(cache, [tokens], trace=trace)
    states = trace[:, 0]
    plans = planner.plans(cache, 0, len(tokens) - 1, states)

    def layer(step: int):
        def run(state: torch.Tensor) -> torch.Tensor:
            hidden = state[None].clone()
            planner._run(cache, 0, len(tokens) - 1, step, hidden)
            return hidden[0]

        return run

    truth = list(states if halves else states[::2])
    expected = reference_plan([layer(i) for i in range(planner.steps)], truth, 4)
    for found, kept in zip(plans, expected[1:], strict=True):
        units = [0] * 5
        for step in kept:
            if halves:
                units[step // 2] |= MLP if step % 2 else ATTENTION
            else:
                units[step] = WHOLE
        assert found.units.tolist() == units
    assert cache.lengths == [15]


def test_one_skipped_layer_is_planned_as_brute_force_does_or_close() -> None:
    """With one layer skipped the programme is greedy only in when it compares, seldom in what."""
    from saltire.reference.skip_plan import brute_force

    agreements = 0
    for seed in range(8):
        model = tiny_model("llama", seed=seed, num_hidden_layers=5, initializer_range=0.05)
        decoder = build_decoder(model)
        planner = SkipPlanner(decoder, 1)
        tokens = random_tokens(model, 1, 12, seed)[0].tolist()
        cache, trace = decoder.new_cache(1, 16), planner.trace(1)
        decoder.prefill(cache, [tokens], trace=trace)

        def run(step: int, planner=planner, cache=cache):
            def layer(state: torch.Tensor) -> torch.Tensor:
                hidden = state[None].clone()
                planner._run(cache, 0, 11, step, hidden)
                return hidden[0]

            return layer

        [plan] = planner.plans(cache, 0, 11, trace[:, 0])
        kept, best = brute_force([run(i) for i in range(5)], list(trace[::2, 0]), 1)
        assert plan.cosine <= best + 1e-5
        agreements += [i for i, unit in enumerate(plan.units.tolist()) if unit] == kept
    assert agreements >= 4


def test_refusals_say_what_to_do() -> None:
    model = tiny_model("llama")
    session = open_session(model)
    with pytest.raises(SaltireError, match="prompt 1 is empty"):
        session.generate([[3], []], 4)
    with pytest.raises(SaltireError, match=r"has 250 tokens and 10 more .* 256 positions"):
        session.generate([[3] * 250], 10)
    with pytest.raises(SaltireError, match="max_new_tokens = -1"):
        session.generate([[3]], -1)
    with pytest.raises(SaltireError, match="expected 1 to 1"):
        open_session(model, "clasp", skip=2)
    with pytest.raises(SaltireError, match="expected one of none, ngram"):
        open_session(model, "lookahead")
    with pytest.raises(SaltireError, match="vocabulary has 200 tokens, the target's 128"):
        open_session(model, "quantised", draft_model=tiny_model("llama", vocab_size=200))
    with pytest.raises(SaltireError, match="layers and heads differ"):
        open_session(model, "quantised", draft_model=tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(SaltireError, match="top_p = 0"):
        Sampling(top_p=0.0)
