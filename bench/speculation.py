"""Speculative decoding on Spec-Bench by its own protocol, over our own plain decoding.

Target: the default model in bf16. For each question: tokens per second with prefill included, as a
ratio to plain decoding of the same question in the same minute; the mean of the ratios counts. A
second target is the W4A8 model with W2A4 and n-gram drafts. Greedy answers are compared token by
token. Needs --data (or SALTIRE_DATA) for the questions.

Keys: auto_speedup (>= 1.6), auto_worst_category (>= 0.97), layer_skip_speedup (the paper's method
alone), plan_share (<= 0.05), greedy_mismatches (0), w4_auto_speedup (>= 1.2), plan_agreement_m4
(>= 0.73), plan_agreement_m8 (>= 0.60): teacher-forced top-1 agreement of drafts that skip 4 and 8
layers as planned, with the static sets of the individually best layers beside them.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import statistics
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from harness import HERE, commit, device

from saltire.decode import DecodeStats, Session, SkipPlanner, open_session
from saltire.decode.text import encode_prompt, stop_tokens
from saltire.models import load_model
from saltire.models.decoder import build_decoder
from saltire.quant import quantize


def questions(folder: str, per_category: int) -> list[tuple[str, str]]:
    """(category, first turn); MT-bench's eight are one category, as Spec-Bench counts them."""
    taken: dict[str, int] = defaultdict(int)
    chosen = []
    six = {"translation", "summarization", "qa", "math_reasoning", "rag"}
    for line in (Path(folder) / "spec_bench" / "question.jsonl").read_text().splitlines():
        question = json.loads(line)
        category = question["category"] if question["category"] in six else "mt_bench"
        if taken[category] < per_category:
            taken[category] += 1
            chosen.append((category, question["turns"][0]))
    return chosen


def compare(
    sessions: dict[str, Session], prompts: list[tuple[str, list[int]]], new: int, stop: list[int]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, DecodeStats], int]:
    """Ratios to plain by method and category, the methods' totals, and greedy mismatches."""
    ratios: dict[str, dict[str, list[float]]] = {n: defaultdict(list) for n in sessions}
    totals = {name: DecodeStats() for name in sessions}
    mismatches = 0
    for session in sessions.values():  # three warm-ups, as the protocol has it
        for _ in range(3):
            session.generate([prompts[0][1]], min(new, 32), stop=stop)
    for category, prompt in prompts:
        speed, answers = {}, {}
        for name, session in sessions.items():
            out = session.generate([prompt], new, stop=stop)
            speed[name] = out.stats.new_tokens / out.stats.total_seconds
            answers[name] = out.tokens[0]
            totals[name].add(out.stats)
        for name in sessions:
            ratios[name][category].append(speed[name] / speed["plain"])
            mismatches += answers[name] != answers["plain"]
    return ratios, totals, mismatches


@torch.no_grad()
def plan_agreement(model, prompts, new: int, stop: list[int], most: int = 8) -> dict[str, float]:
    """Top-1 agreement of skipping drafts on the model's own answers, planned and static.

    The static sets are the individually best layers by the same measure on the same tokens: an
    advantage for them, for the plans see only what was decoded before.
    """
    decoder = build_decoder(model)
    planner = SkipPlanner(decoder, most)
    session = Session(decoder)
    hits: dict[str, list[float]] = defaultdict(list)
    singles = torch.zeros(decoder.layers)
    texts = []
    for _, prompt in prompts:
        answer = session.generate([prompt], new, stop=stop).tokens[0]
        texts.append((prompt, answer))
    total = 0

    def agree(prompt, answer, units, plan_every: int = 0, skipped: int = 0) -> float:
        cache = decoder.new_cache(1, len(prompt) + len(answer) + 8)
        trace = planner.trace(1)
        decoder.prefill(cache, [prompt], trace=trace)
        good = 0
        for i, (token, target) in enumerate(pairwise(answer)):
            if plan_every and i % plan_every == 0:
                position = cache.lengths[0] - 1
                units = planner.plans(cache, 0, position, trace[:, 0])[skipped - 1].units
            guess = decoder.step(cache, [[token]], units=units, commit=False)
            good += int(guess.best[0]) == target
            decoder.step(cache, [[token]], trace=trace)
        return good

    for prompt, answer in texts:
        total += len(answer) - 1
        for layer in range(decoder.layers):
            units = decoder.all_units.clone()
            units[layer] = 0
            singles[layer] += agree(prompt, answer, units)
    order = singles.argsort(descending=True).tolist()
    for skipped in (4, 8):
        static = decoder.all_units.clone()
        static[order[:skipped]] = 0
        for prompt, answer in texts:
            hits[f"plan_agreement_m{skipped}"].append(
                agree(prompt, answer, None, plan_every=8, skipped=skipped)
            )
            hits[f"static_agreement_m{skipped}"].append(agree(prompt, answer, static))
    return {name: sum(values) / total for name, values in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("SALTIRE_DATA"), help="folder of data")
    parser.add_argument("--quick", action="store_true", help="fewer questions and tokens")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.data:
        parser.error("give --data FOLDER (or SALTIRE_DATA): spec_bench/question.jsonl is in it")
    start = time.perf_counter()
    model, tokenizer = load_model()
    calibration = "self"
    drafts = {}
    for recipe in ("w4a8", "w2a4-g64"):
        drafts[recipe], _ = load_model()
        quantize(drafts[recipe], tokenizer, recipe, calibration, samples=8, length=256)
    exact_model = model
    model = load_model()[0].to(torch.bfloat16)
    stop = stop_tokens(tokenizer)
    chosen = questions(options.data, 3 if options.quick else 40)
    new = 96 if options.quick else 256
    limit = model.config.max_position_embeddings - new
    prompts = [(c, encode_prompt(tokenizer, text)[:limit]) for c, text in chosen]
    cheap = drafts["w4a8"]
    sessions = {
        "plain": open_session(model),
        "ngram": open_session(model, "ngram"),
        "clasp": open_session(model, "clasp"),
        "quantised": open_session(model, "quantised", cheap),
        "auto": open_session(model, "auto", cheap),
    }
    ratios, totals, mismatches = compare(sessions, prompts, new, stop)
    low = {
        "plain": open_session(cheap),
        "auto": open_session(cheap, "auto", drafts["w2a4-g64"]),
    }
    low_ratios, low_totals, low_mismatches = compare(low, prompts, new, stop)
    rows = []
    for target, r, t in (("bf16", ratios, totals), ("w4a8", low_ratios, low_totals)):
        for name, by_category in r.items():
            stats = t[name].to_dict()
            for category, values in by_category.items():
                rows.append(
                    {
                        "target": target,
                        "method": name,
                        "category": category,
                        "speedup": round(statistics.mean(values), 3),
                        "questions": len(values),
                    }
                )
            everything = [v for values in by_category.values() for v in values]
            print(
                f"{target:5} {name:10} {statistics.mean(everything):.3f}x  "
                f"tokens a step {stats['tokens_per_step']:.2f}  acceptance "
                f"{stats['acceptance']:.2f}  rounds {stats['rounds']}"
            )

    def mean(r, name: str) -> float:
        return statistics.mean(v for values in r[name].values() for v in values)

    clasp = totals["clasp"]
    agreement = plan_agreement(
        exact_model, prompts[:: max(1, len(prompts) // (3 if options.quick else 9))], 64, stop
    )
    stamp = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device(),
        "quick": options.quick,
    }
    path = HERE / "results" / "speculation.csv"
    old = list(csv.DictReader(path.open())) if path.exists() else []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*stamp, *rows[0]])
        writer.writeheader()
        writer.writerows([*old, *({**stamp, **row} for row in rows)])
    keys = {
        "auto_speedup": mean(ratios, "auto"),
        "auto_worst_category": min(statistics.mean(v) for v in ratios["auto"].values()),
        "layer_skip_speedup": mean(ratios, "clasp"),
        "layer_skip_acceptance": clasp.acceptance,
        "quantised_speedup": mean(ratios, "quantised"),
        "ngram_speedup": mean(ratios, "ngram"),
        "plan_share": clasp.plan_seconds / clasp.total_seconds,
        "greedy_mismatches": mismatches + low_mismatches,
        "w4_auto_speedup": mean(low_ratios, "auto"),
        **agreement,
    }
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({**{k: round(v, 3) for k, v in keys.items()}, **stamp, "seconds": seconds}))


if __name__ == "__main__":
    main()
