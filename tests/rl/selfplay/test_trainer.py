"""The self-play trainer: what a step does, who plays whom, and that resuming changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from saltire.cli import build_app
from saltire.errors import SaltireError
from saltire.games import make, read_records, replay
from saltire.games.boast import Boast
from saltire.models.saving import save_checkpoint
from saltire.rl.runlog import read_log
from saltire.rl.selfplay.collect import LEARNER, seat
from saltire.rl.selfplay.config import SelfPlayConfig
from saltire.rl.selfplay.setup import make_selfplay
from saltire.rl.selfplay.trainer import SelfPlayTrainer
from saltire.rl.selfplay.updates import Turns, learn, measure
from saltire.rl.step import Experience
from saltire.settings import build
from tests.tiny import tiny_model, tiny_tokenizer


def settings(output: Path, **changes) -> dict:
    values = {
        "game": "boast",  # which a model that writes noise forfeits: there is something to learn
        "output": str(output),
        "steps": 4,
        "matches": {"matches": 4, "max_new_tokens": 6, "think": False},
        "update": {"learning_rate": 1e-3, "minibatches": 2, "micro_batch": 16},
        "checkpoint": {"every": 2},
    }
    for name, value in changes.items():
        merge = isinstance(values.get(name), dict) and name != "options"
        values[name] = {**values[name], **value} if merge else value
    return values


def tiny():
    return tiny_model("llama", vocab_size=259, max_position_embeddings=2048)


def trainer_for(output: Path, seed: int = 0, **changes) -> SelfPlayTrainer:
    config = build(SelfPlayConfig, settings(output, **changes))
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=2048, seed=seed)
    return make_selfplay(config, model, tiny_tokenizer())


def weights(trainer: SelfPlayTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.parts.policy.parameters()])


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if not k.endswith("seconds")} for r in records]


ENTROPY = {
    "schedule": {"kind": "constant", "level": 0.9},
    "controller": {"kind": "pid", "kp": 0.05, "ki": 0.01},
    "actuator": {"name": "entropy_bonus"},
}


@pytest.mark.parametrize(
    "changes",
    [
        {"entropy": ENTROPY},
        {"opponent": {"kind": "past", "every": 1, "keep": 2}, "lora": {"rank": 2}},
        {"opponent": {"kind": "fixed", "agent": "random"}, "advantages": {"kind": "rae"}},
    ],
    ids=["self-entropy", "past-lora", "fixed-rae"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, changes) -> None:
    whole = trainer_for(tmp_path / "whole", **changes)
    whole.run()
    first = trainer_for(tmp_path / "cut", **changes)
    for step in range(3):  # killed in step 3, with a checkpoint of step 2
        first.step(step)
        if step == 1:
            first.save(2)
    second = trainer_for(tmp_path / "cut", seed=0 if "lora" in changes else 9, **changes)
    records = second.run(resume=True)
    assert torch.equal(weights(second), weights(whole))
    expected = read_log(tmp_path / "whole" / "log.jsonl")
    assert without_times(records) == without_times(expected)[2:]
    assert second.parts.estimator.state_dict() == whole.parts.estimator.state_dict()
    matches = {r.notes["step"]: [] for r in read_records(tmp_path / "cut" / "matches.jsonl")}
    assert sorted(matches) == [2, 3]


def test_matches_of_a_run_replay(tmp_path) -> None:
    trainer_for(tmp_path / "run", steps=2).run()
    records = read_records(tmp_path / "run" / "matches.jsonl")
    assert [(r.notes["step"], r.number) for r in records] == [
        (s, n) for s in (0, 1) for n in range(4)
    ]
    for record in records:
        replay(make(record.game, **record.options), record)
    trainer_for(tmp_path / "run", steps=2).run(resume=True)  # nothing is left to do
    assert read_records(tmp_path / "run" / "matches.jsonl") == records


def test_a_step_logs_outcomes_and_what_dept_sees(tmp_path) -> None:
    record = trainer_for(tmp_path / "run", steps=1).run()[0]
    outcomes = make("boast").outcomes
    assert sum(record[f"share {label}"] for label in outcomes) == pytest.approx(1)
    assert 0 <= record["match_entropy"] <= 1
    assert record["forfeits"] == 1.0
    assert {"dept/boast/player 0/lambda", "grad_norm", "advantage_size"} <= set(record)


def test_a_step_makes_what_was_rewarded_likelier(tmp_path) -> None:
    """The log-probs of the turns whose player was rewarded rise over those of the others."""
    trainer = trainer_for(
        tmp_path / "run", game="dont-say-it", options={"turns": 2}, advantages={"kind": "none"},
        update={"minibatches": 1, "epochs": 3, "learning_rate": 3e-3},
    )  # fmt: skip
    signs = [(1.0, -1.0), (-1.0, 1.0), (-1.0, 1.0), (1.0, -1.0)]
    trainer.parts.estimator.advantages = lambda matches: signs  # type: ignore[method-assign]
    played = trainer._play(0)
    sequences = played.sequences(0)
    advantages = torch.tensor(played.by_turn(signs))
    before, _ = measure(trainer.parts, trainer.config, sequences, 1.0)
    trainer.step(0)
    after, _ = measure(trainer.parts, trainer.config, sequences, 1.0)
    moved = (after - before).sum(dim=1)
    assert moved[advantages > 0].mean() > moved[advantages < 0].mean() + 0.1


def test_who_sits_where() -> None:
    seats = [seat(n, 2, "past", 0.5) for n in range(8)]
    mixed = [s for s in seats if "past" in s]
    assert len(mixed) == 4
    assert mixed.count((LEARNER, "past")) == mixed.count(("past", LEARNER)) == 2
    assert {seat(n, 2, "", 0.5) for n in range(4)} == {(LEARNER, LEARNER)}
    rotating = [seat(n, 5, "other", 1.0).index(LEARNER) for n in range(10)]
    assert rotating == [*range(5), *range(5)]


def test_an_opponents_turns_are_not_learnt_from(tmp_path) -> None:
    trainer = trainer_for(
        tmp_path / "run", opponent={"kind": "fixed", "agent": "first", "share": 1.0}
    )
    played = trainer._play(0)
    for record, seats in zip(played.records, played.seats, strict=True):
        assert [record.agents[p] for p in seats] == [LEARNER]
    assert all(turn.player in played.seats[turn.match] for turn in played.turns)
    assert all(len(outcome.rewards) == 1 for outcome in played.outcomes())


def test_past_selves_are_the_weights_of_their_step(tmp_path) -> None:
    trainer = trainer_for(
        tmp_path / "run", opponent={"kind": "past", "every": 1, "keep": 2, "share": 1.0}
    )
    starts = weights(trainer).clone()
    trainer.run()
    pool, past = trainer.parts.pool, trainer.parts.past
    assert pool is not None
    assert past is not None
    assert pool.steps == [2, 3]
    assert not torch.equal(weights(trainer), starts)
    names = {a for r in read_records(tmp_path / "run" / "matches.jsonl") for a in r.agents}
    assert LEARNER in names
    assert all(name == LEARNER or name.startswith("step ") for name in names)


def test_more_than_two_players_with_unequal_roles(tmp_path) -> None:
    record = trainer_for(
        tmp_path / "run", game="undercover", options={"rounds": 1}, players=5, steps=1,
        matches={"max_new_tokens": 8},
    ).run()[0]  # fmt: skip
    assert record["matches"] == 4
    assert "dept/undercover/spy/lambda" in record


def test_a_crashed_match_is_logged_and_the_others_are_learnt_from(tmp_path, monkeypatch) -> None:
    observe = Boast.observe

    def breaks(self, state, player):
        if state.beasts == (0, 1):
            raise RuntimeError("bad rule")
        return observe(self, state, player)

    monkeypatch.setattr(Boast, "observe", breaks)
    changes = {"matches": {"matches": 16}, "steps": 1}
    record = trainer_for(tmp_path / "run", **changes).run()[0]
    assert record["crashed"] + record["matches"] == 16
    assert 0 < record["crashed"] < 16
    logged = read_records(tmp_path / "run" / "matches.jsonl")
    assert sum("bad rule" in r.error for r in logged) == record["crashed"]
    monkeypatch.setattr(Boast, "observe", lambda *_: 1 / 0)
    with pytest.raises(SaltireError, match="every match of step 0 crashed"):
        trainer_for(tmp_path / "other", **changes).run()


def test_a_step_in_which_the_learner_never_moves_is_refused(tmp_path, monkeypatch) -> None:
    """It sits second, and whoever is first forfeits at once."""
    monkeypatch.setattr(
        "saltire.rl.selfplay.collect.seat", lambda *_: ("silent", LEARNER), raising=True
    )
    trainer = trainer_for(
        tmp_path / "run", opponent={"kind": "fixed", "agent": "silent", "share": 1.0}
    )
    with pytest.raises(SaltireError, match="wrote nothing in a whole step"):
        trainer.step(0)


def test_a_rank_without_a_turn_learns_nothing(tmp_path, monkeypatch) -> None:
    """It goes through the motions with the others, and changes no weight."""
    trainer = trainer_for(tmp_path / "run")
    played = trainer._play(0)
    played.turns.clear()
    monkeypatch.setattr("saltire.rl.selfplay.updates.all_sum", lambda values: [4.0] * len(values))
    turns = Turns.of(played, 0, trainer.parts.device)
    logprob, _ = measure(trainer.parts, trainer.config, turns.sequences, 1.0)
    experience = Experience(turns.sequences, turns.advantages([]), logprob)
    before = weights(trainer)
    learn(trainer.parts, trainer.config, experience, turns.places, trainer.knobs(1.0), 0)
    assert torch.equal(weights(trainer), before)


def test_evaluation_plays_against_the_agent_that_is_named(tmp_path) -> None:
    changes = {"evaluation": {"every": 1, "matches": 4, "agent": "silent"}, "steps": 1}
    record = trainer_for(tmp_path / "run", **changes).run()[0]
    assert 0.5 <= record["win_rate"] <= 1  # whoever says nothing forfeits when its turn comes


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"game": "dont-say-itt"}, "dont-say-it"),
        ({"matches": {"matches": 3}}, "multiple"),
        ({"matches": {"temperature": 0.0}}, "above 0"),
        ({"opponent": {"kind": "fixed"}}, "names its agent"),
        ({"opponent": {"kind": "fixed", "agent": "randm"}}, "random"),
        ({"opponent": {"share": 0.0}}, "share"),
        ({"update": {"kl_coefficient": 0.1}}, "kl_coefficient"),
        ({"advantages": {"fast": 0.99}}, "fast < slow"),
        ({"players": 3}, "2 players; 3"),
        ({"lora": {"rank": 2}, "matches": {"engine": "decoder"}}, "engine"),
        ({"steps": 0}, "steps"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, told) -> None:
    with pytest.raises(SaltireError, match=told):
        trainer_for(tmp_path / "run", **changes)


def test_a_game_with_one_outcome_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Boast, "outcomes", ("player 0",))
    for kind in ("dept", "rae"):
        with pytest.raises(SaltireError, match="at least two outcomes"):
            trainer_for(tmp_path / "r", advantages={"kind": kind})


def test_resuming_with_other_settings_or_over_a_run_is_refused(tmp_path) -> None:
    trainer_for(tmp_path / "run", steps=2).run()
    with pytest.raises(SaltireError, match="--resume"):
        trainer_for(tmp_path / "run", steps=2).run()
    with pytest.raises(SaltireError, match="advantages"):
        trainer_for(tmp_path / "run", steps=2, advantages={"scale": 2.0}).run(resume=True)


def test_saltire_train_runs_self_play(tmp_path) -> None:
    save_checkpoint(tiny(), tiny_tokenizer(), tmp_path / "model")
    values = settings(tmp_path / "run", steps=1) | {
        "kind": "selfplay", "model": str(tmp_path / "model"),
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(build_app(), ["train", str(tmp_path / "s.yaml"), "--json"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    facts = json.loads(result.stdout.splitlines()[-1])
    assert Path(facts["model"], "config.json").exists()
    assert facts["last"]["step"] == 0


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_to_the_same_end(tmp_path) -> None:
    """SIGKILL at some moment after the first checkpoint; whatever it leaves, --resume takes up."""
    save_checkpoint(tiny(), tiny_tokenizer(), tmp_path / "model")

    def command(name: str, *options: str) -> list[str]:
        values = settings(tmp_path / name, steps=8, checkpoint={"every": 1}) | {
            "kind": "selfplay", "model": str(tmp_path / "model"),
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values))
        return [sys.executable, "-m", "saltire", "train", str(path), "--json", *options]

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, env=environment, timeout=300)
    killed = subprocess.Popen(command("cut"), env=environment)
    while not any((tmp_path / "cut" / "checkpoints").glob("*[0-9]")):
        assert killed.poll() is None
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    subprocess.run(command("cut", "--resume"), check=True, env=environment, timeout=300)
    logs = [read_log(tmp_path / name / "log.jsonl") for name in ("whole", "cut")]
    assert without_times(logs[0]) == without_times(logs[1])
    matches = [read_records(tmp_path / name / "matches.jsonl") for name in ("whole", "cut")]
    assert matches[0] == matches[1]


@pytest.mark.slow
def test_two_ranks_play_the_matches_of_one(tmp_path) -> None:
    save_checkpoint(tiny(), tiny_tokenizer(), tmp_path / "model")
    logs = []
    for ranks in (1, 2):
        values = settings(tmp_path / f"run{ranks}", steps=2) | {
            "kind": "selfplay", "model": str(tmp_path / "model"),
            "opponent": {"kind": "past", "every": 1},
        }  # fmt: skip
        values["matches"]["engine"] = "transformers"
        path = tmp_path / f"{ranks}.yaml"
        path.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        command += ["--master-port", "29617", "-m", "saltire", "train", str(path), "--json"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)
        logs.append(read_log(tmp_path / f"run{ranks}" / "log.jsonl"))
    one, two = logs
    for a, b in zip(one, two, strict=True):
        for name in a:
            if not name.endswith("seconds"):
                assert b[name] == pytest.approx(a[name], abs=2e-4), name
    records = [read_records(tmp_path / f"run{r}" / "matches.jsonl") for r in (1, 2)]
    assert [r.turns for r in records[0]] == [r.turns for r in records[1]]
