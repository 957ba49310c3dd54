"""Model agents: batches that change no match, caches that change no token, limits that hold."""

from __future__ import annotations

import pytest
import torch

from saltire.errors import SaltireError
from saltire.games import Fixture, make, play, scripted
from saltire.models.decoder import build_decoder
from saltire.models.saving import save_checkpoint
from saltire.rl.prompts import Codec
from saltire.rl.rollout import TransformersRollout, invert_distribution
from saltire.rl.selfplay import DecoderWriter, Draft, ModelAgent, RolloutWriter, Voice, open_agents
from saltire.rl.selfplay.decoder_writer import common, draw
from tests.tiny import tiny_model, tiny_tokenizer

SPEAKS = Voice(max_new_tokens=8, temperature=1.0, think=False)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", vocab_size=259, max_position_embeddings=4096)


def agent(model, sequences=16, name="model", voice=SPEAKS, keep=False) -> ModelAgent:
    codec = Codec(tiny_tokenizer(), voice.instruction)
    writer = DecoderWriter(build_decoder(model), codec.stop, sequences)
    return ModelAgent(name, codec, writer, voice, keep)


def matches(playing, in_flight, count=5, name="dont-say-it", **options):
    games = [Fixture(n, n, (playing.name, playing.name)) for n in range(count)]
    played = play(make(name, **options), {playing.name: playing}, games, in_flight)
    return sorted(played, key=lambda record: record.number)


def test_matches_are_the_same_alone_and_in_a_batch(model) -> None:
    one = matches(agent(model), 1, turns=4)
    five = matches(agent(model), 5, turns=4)
    assert one == five
    assert not any(record.error for record in one)


def test_a_cache_that_is_too_small_costs_time_and_changes_no_word(model) -> None:
    few, many = agent(model, sequences=2), agent(model, sequences=16)
    few_records, many_records = matches(few, 4, turns=4), matches(many, 4, turns=4)
    assert few_records == many_records
    assert few.writer.computed > many.writer.computed


def test_only_what_a_turn_adds_is_computed(model) -> None:
    playing = agent(model, keep=True)
    matches(playing, 1, count=1, turns=6)
    assert len(playing.taken) == 6
    whole = sum(len(turn.prompt) for turn in playing.taken)
    assert playing.writer.computed + playing.writer.reused == whole
    assert playing.writer.computed < whole / 2


def test_the_rules_of_a_game_are_computed_once(model) -> None:
    playing = agent(model, keep=True)
    matches(playing, 8, count=8, turns=2)
    first = [turn for turn in playing.taken if turn.turn < 2]
    assert playing.writer.computed < 0.5 * sum(len(turn.prompt) for turn in first)


def test_the_decoder_writes_what_transformers_writes(model) -> None:
    """Both invert the same distribution functions; in float32 only a near tie could differ."""
    rollout = TransformersRollout(model, [2], 0)
    writers = [DecoderWriter(build_decoder(model), [2], 4), RolloutWriter(rollout, 4096)]
    prompts = [[1, *range(10, 10 + n)] for n in (3, 9, 20)]
    found = []
    for writer in writers:
        done = {}
        for n, prompt in enumerate(prompts):
            uniforms = torch.rand(
                12, dtype=torch.float64, generator=torch.Generator().manual_seed(n)
            )
            writer.submit(Draft((n, 0), prompt, uniforms, 1.0))
        while writer.busy:
            done.update(writer.advance())
        found.append(done)
    assert found[0] == found[1]
    assert len(found[0]) == 3


@pytest.mark.parametrize("size", [5, 256, 1000], ids=["one block", "exact", "a part left over"])
def test_draw_is_the_inverse_of_the_distribution_function(size) -> None:
    logits = torch.randn(64, size) * 3
    uniforms = torch.rand(64, dtype=torch.float64)
    uniforms[0], uniforms[1] = 0.0, 1 - 1e-16
    temperatures = torch.full((64,), 0.7)
    expected = invert_distribution(logits, uniforms, 0.7)
    found = draw(logits, uniforms, temperatures)
    assert (found == expected).float().mean() > 0.96  # float32 against float64 weights
    assert (found - expected).abs().max() <= 1
    greedy = draw(logits, uniforms, torch.zeros(64))
    assert torch.equal(greedy, logits.argmax(-1))


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.full((4, 300), -torch.inf)
    logits[:, 7] = 0.0
    uniforms = torch.tensor([0.0, 0.5, 0.999999, 1 - 1e-16], dtype=torch.float64)
    assert draw(logits, uniforms, torch.ones(4)).tolist() == [7] * 4
    with pytest.raises(SaltireError, match="finite"):
        draw(torch.full((1, 4), torch.nan), uniforms[:1], torch.ones(1))


def test_common_prefix() -> None:
    assert common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common([], [1]) == 0
    assert common([1, 2], [1, 2]) == 2


def test_an_endless_reply_is_cut_and_a_thought_without_end_forfeits(model) -> None:
    with torch.no_grad():
        quiet = tiny_model(
            "llama", vocab_size=259, tie_word_embeddings=False, max_position_embeddings=4096
        )
        quiet.get_output_embeddings().weight[2] = 0  # hardly ever stops
    playing = agent(quiet, voice=Voice(6, 0.0, think=True))
    for record in matches(playing, 3, count=3, turns=2):
        assert record.forfeits == (0,)
        assert "never closed" in record.turns[0].refused


def test_a_prompt_that_does_not_fit_ends_its_match_with_the_reason(model) -> None:
    short = tiny_model("llama", vocab_size=259, max_position_embeddings=64)
    record = matches(agent(short), 1, count=1)[0]
    assert "64 positions" in record.error


def test_weights_that_changed_leave_no_trace_of_the_old_ones() -> None:
    changing = tiny_model("llama", vocab_size=259, max_position_embeddings=4096)
    playing = agent(changing)
    matches(playing, 2, count=2, turns=2)
    with torch.no_grad():
        for parameter in changing.parameters():
            parameter.mul_(0.9)
    playing.writer.restart()
    assert matches(playing, 2, count=2, turns=2) == matches(agent(changing), 2, count=2, turns=2)


def test_agents_by_name(model, tmp_path) -> None:
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "m")
    agents = open_agents([str(tmp_path / "m"), "random"], SPEAKS, sequences=4)
    games = [Fixture(0, 0, tuple(agents))]
    record = next(iter(play(make("dont-say-it", turns=3), agents, games)))
    assert not record.error
    with pytest.raises(SaltireError, match="random"):
        open_agents(["rondom"], SPEAKS)
    with pytest.raises(SaltireError, match="terminal"):
        open_agents(["human"], SPEAKS)
    assert scripted("random").retries == 0
