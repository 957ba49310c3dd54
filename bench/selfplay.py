"""Self-play: who gets out of an impasse, who wins, and what batching matches brings.

1. toys: the forced draw and the dominant outcome of saltire.rl.impasse_toys, with DEPT and with one
   average a role (RAE), every seed from the same start.
2. batch: matches of Don't Say It on SmolLM2 with our decoder in float32, as the trainer plays them,
   32 in flight against one after another; tokens are those the model writes.
3. robin: a forced-draw game in words, played by a transformer of 14 k weights made here; DEPT, RAE,
   GRPO-like groups and no baseline each train from the same warm start, then all meet.

Keys: dept_escapes and rae_escapes (shares of seeds that leave, the worse of both toys: >= 0.8 and
<= 0.2), dept_lowest_norm and rae_lowest_norm (of the gradient over its start, the worst seed: > 0.1
and < 0.01), batched_matches_speedup (>= 6), dept_overhead (of the time that playing takes; < 0.001)
and robin_KIND with robin_KIND_low and _high (win rate, 90 % interval over seeds).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from harness import Report, Timing

from saltire.games.game import Game, IllegalMove, Payoff, draw, lost_by_forfeit, win

SEEDS = 5
KINDS = ("dept", "rae", "grpo", "none")
T_95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}
WORDS = ("red", "oak", "sea", "sun", "fog", "ice")


# --- toys --------------------------------------------------------------------------------------


def toy_run(job: tuple[int, str, int]) -> tuple[bool, float]:
    """One toy, one kind of advantage, one seed: did it leave, and its lowest gradient norm."""
    import torch

    from saltire.rl.impasse_toys import TOYS, estimator, run_toy

    torch.set_num_threads(1)
    toy, kind, seed = job
    run = run_toy(TOYS[toy], estimator(kind), seed)
    return run.left(), run.lowest_norm()


def toys(report: Report, pool: Any) -> None:
    from saltire.rl.impasse_toys import TOYS

    jobs = [(t, k, s) for t in range(len(TOYS)) for k in ("dept", "rae") for s in range(SEEDS)]
    start = time.perf_counter()
    found = dict(zip(jobs, pool.map(toy_run, jobs, chunksize=1), strict=True))
    seconds = (time.perf_counter() - start) / len(jobs)
    for kind in ("dept", "rae"):
        shares, norms = [], []
        for t, toy in enumerate(TOYS):
            runs = [found[t, kind, seed] for seed in range(SEEDS)]
            shares.append(sum(left for left, _ in runs) / SEEDS)
            # RAE's gradient dies where it stays; a seed that leaves says nothing about that.
            some = [norm for left, norm in runs if kind == "dept" or not left]
            norms.append(min(some) if kind == "dept" else max(some, default=0.0))
            report.row(
                f"toy: {toy.name}",
                Timing(kind, [seconds] * 2),
                escapes=shares[-1],
                lowest_norm=norms[-1],
            )
        report.key(f"{kind}_escapes", min(shares) if kind == "dept" else max(shares))
        worst = min(norms) if kind == "dept" else max(norms)
        report.keys[f"{kind}_lowest_norm"] = float(f"{worst:.3g}")


# --- batched matches ---------------------------------------------------------------------------


def batch(report: Report, threads: int) -> None:
    import torch

    from saltire.games import Fixture, make, play
    from saltire.models.decoder import build_decoder
    from saltire.models.loading import load_model
    from saltire.rl.dept import Dept
    from saltire.rl.match_outcome import MatchOutcome
    from saltire.rl.prompts import Codec
    from saltire.rl.selfplay import DecoderWriter, ModelAgent, Voice

    torch.set_num_threads(threads)
    voice = Voice(max_new_tokens=64, temperature=0.8, think=False)
    model, tokenizer = load_model("default")
    decoder, codec = build_decoder(model), Codec(tokenizer, voice.instruction)
    game = make("dont-say-it", turns=4)

    def tokens_per_second(matches: int, in_flight: int, first: int) -> tuple[float, float, Any]:
        writer = DecoderWriter(decoder, codec.stop, 2 * in_flight)
        agent = ModelAgent("model", codec, writer, voice, keep=True)
        fixtures = [Fixture(first + n, first + n, ("model", "model")) for n in range(matches)]
        start = time.perf_counter()
        records = list(play(game, {"model": agent}, fixtures, in_flight))
        seconds = time.perf_counter() - start
        assert not any(record.error for record in records), records[0].error
        written = sum(len(turn.completion) for turn in agent.taken)
        return written / seconds, seconds, (writer, records, written)

    tokens_per_second(1, 1, 1000)  # wakes the threads, reads the weights once
    alone, alone_seconds, (one, _, few) = tokens_per_second(3, 1, 0)
    together, seconds, (many, records, written) = tokens_per_second(32, 32, 0)
    for name, rate, spent, writer, count in (
        ("one at a time", alone, alone_seconds, one, few),
        ("32 in flight", together, seconds, many, written),
    ):
        report.row(
            "matches on SmolLM2, f32",
            Timing(name, [spent] * 2),
            tokens_per_second=rate,
            written=float(count),
            prompt_computed=float(writer.computed),
            prompt_reused=float(writer.reused),
        )
    report.key("batched_matches_speedup", together / alone)
    dept = Dept({game.name: game.outcomes}, {game.name: game.roles})
    outcomes = [MatchOutcome(r.game, r.outcome, r.roles, r.rewards, r.forfeits) for r in records]
    times = []
    for _ in range(50):
        start = time.perf_counter()
        dept.advantages(outcomes)
        times.append(time.perf_counter() - start)
    # A step scores and learns besides playing, so this share is above the true one.
    report.keys["dept_overhead"] = float(f"{statistics.median(times) / seconds:.2g}")


# --- a round robin on a game in words ----------------------------------------------------------


@dataclass(frozen=True)
class Duel:
    """luck: two uniform numbers of the deal; said: the moves, player 0's first."""

    luck: tuple[float, float]
    said: tuple[str, ...] = ()
    result: Payoff | None = None


@dataclass(frozen=True)
class Standoff(Game[Duel, str]):
    """Both say one sentence, unheard by the other: ``wait``, or ``strike`` and two words.

    Two waits draw. A strike wins less than half of the time, so that to try is a little worse than
    to wait, unless its words are the right two of 36; then it nearly always wins.
    """

    name: ClassVar[str] = "standoff"
    clumsy: float = 0.46
    skilled: float = 0.95

    def reset(self, seed: int, players: int | None = None) -> Duel:
        from random import Random

        self.check_players(players)
        random = Random(seed)
        return Duel((random.random(), random.random()))

    def turn(self, state: Duel) -> int:
        return len(state.said)

    def observe(self, state: Duel, player: int) -> str:
        return f"player {player} :"

    def legal(self, state: Duel) -> tuple[str, ...]:
        return ("wait", *(f"strike {a} {b}" for a in WORDS for b in WORDS))

    def parse_action(self, state: Duel, text: str) -> str:
        move = " ".join(text.split())
        if move not in self.legal(state):
            raise IllegalMove("a move is wait, or strike and two words")
        return move

    def step(self, state: Duel, move: str) -> Duel:
        said = (*state.said, move)
        if len(said) < 2:
            return replace(state, said=said)
        strikes = [one != "wait" for one in said]
        if not any(strikes):
            return replace(state, said=said, result=draw("Both wait."))
        right = [one == f"strike {WORDS[-1]} {WORDS[0]}" for one in said]
        chance = [self.skilled if r else self.clumsy for r in right]
        if all(strikes):
            odds = 0.5 if right[0] == right[1] else self.skilled if right[0] else 1 - self.skilled
        else:
            odds = chance[0] if strikes[0] else 1 - chance[1]
        return replace(state, said=said, result=win(int(state.luck[0] >= odds), "A duel."))

    def forfeit(self, state: Duel, reason: str) -> Duel:
        return replace(state, result=lost_by_forfeit(self.turn(state), reason))

    def payoff(self, state: Duel) -> Payoff | None:
        return state.result


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "player", "0", "1", ":", "wait", "strike", *WORDS]
    words += ["Reply", "with", "your", "move", "alone", "."]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def robin_seed(job: tuple[int, int, str]) -> dict[str, Any]:
    """Train all kinds from one warm start, let all pairs meet; shares of the draw and win rates."""
    import numpy as np
    import torch

    from saltire.games import play, rate, round_robin
    from saltire.rl.policy import Policy
    from saltire.rl.prompts import Codec
    from saltire.rl.scratch import small_model, supervise
    from saltire.rl.selfplay import ModelAgent, Voice
    from saltire.rl.selfplay.config import SelfPlayConfig
    from saltire.rl.selfplay.setup import make_parts
    from saltire.rl.selfplay.trainer import SelfPlayTrainer
    from saltire.settings import build

    seed, steps, root = job
    torch.set_num_threads(1)
    game, tokenizer = Standoff(), word_tokenizer()
    start = small_model(len(tokenizer), hidden=32, layers=1, heads=2, seed=seed)
    codec = Codec(tokenizer, Voice(think=False).instruction)
    random = np.random.default_rng(seed)
    prompts, moves = [], []
    for _ in range(2000):
        prompts.append(codec.encode(f"player {random.integers(2)} :"))
        strikes = random.random() < 0.3
        said = f"strike {random.choice(WORDS)} {random.choice(WORDS)}" if strikes else "wait"
        moves.append([*tokenizer.encode(said, add_special_tokens=False), 2])
    supervise(Policy(start), prompts, moves, steps=200, batch=64, learning_rate=5e-3, seed=seed)
    weights = {name: p.detach().clone() for name, p in start.state_dict().items()}
    agents: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for kind in KINDS:
        model = small_model(len(tokenizer), hidden=32, layers=1, heads=2, seed=seed)
        model.load_state_dict(weights)
        config = build(
            SelfPlayConfig,
            {
                "game": "standoff", "output": str(Path(root) / f"{kind}-{seed}"), "seed": seed,
                "steps": steps, "advantages": {"kind": kind},
                "matches": {"matches": 48, "max_new_tokens": 5, "think": False},
                "update": {"learning_rate": 2e-3, "minibatches": 1, "micro_batch": 256},
                "checkpoint": {"every": 0},
            },
        )  # fmt: skip
        trainer = SelfPlayTrainer(config, make_parts(config, game, model, tokenizer))
        records = [trainer.step(step)[0] for step in range(steps)]
        tail = records[-max(1, steps // 10) :]
        found[f"{kind} draws"] = statistics.mean(record["share draw"] for record in tail)
        found[f"{kind} norm"] = statistics.mean(record["grad_norm"] for record in tail)
        found[f"{kind} overhead"] = statistics.median(
            record["advantage_seconds"] / record["seconds"] for record in records
        )
        found[f"{kind} step"] = statistics.median(record["seconds"] for record in records)
        trainer.parts.refresh()
        voice = Voice(max_new_tokens=5, temperature=1.0, think=False, seed=seed)
        agents[kind] = ModelAgent(kind, codec, trainer.parts.learner.writer, voice)
    played = list(play(game, agents, round_robin(list(KINDS), 100, 10_000 * (seed + 1)), 64))
    for rating in rate(played, resamples=2):
        found[rating.agent] = rating.win_rate
    return found


def robin(report: Report, pool: Any, steps: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        jobs = [(seed, steps, root) for seed in range(SEEDS)]
        found = pool.map(robin_seed, jobs, chunksize=1)
    for kind in KINDS:
        rates = [one[kind] for one in found]
        mean = statistics.mean(rates)
        half = T_95[SEEDS - 1] * statistics.stdev(rates) / SEEDS**0.5
        report.row(
            "round robin",
            Timing(kind, [one[f"{kind} step"] for one in found]),
            win_rate=mean,
            half_width=half,
            draws_at_the_end=statistics.mean(one[f"{kind} draws"] for one in found),
            stuck_seeds=float(sum(one[f"{kind} draws"] > 2 / 3 for one in found)),
        )
        report.key(f"robin_{kind}", mean)
        report.key(f"robin_{kind}_low", mean - half)
        report.key(f"robin_{kind}_high", mean + half)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="shorter self-play, the same method")
    parser.add_argument("--only", default="", help="one part: toys, batch or robin")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=0, help="steps of self-play in the robin")
    options = parser.parse_args()
    report = Report("selfplay", options.quick)
    parts = [options.only] if options.only else ["toys", "batch", "robin"]
    if "batch" in parts:
        batch(report, options.threads)
    with multiprocessing.get_context("spawn").Pool(options.threads) as pool:
        if "toys" in parts:
            toys(report, pool)
        if "robin" in parts:
            robin(report, pool, options.steps or (250 if options.quick else 1000))
    report.finish()


if __name__ == "__main__":
    main()
