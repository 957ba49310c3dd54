"""Speculative decoding on Spec-Bench by its own protocol, over our own plain decoding.

Target: the default model in bf16, with drafts of the same model rounded to 4 bits. For each
question: tokens per second with prefill included, as a ratio to plain decoding of the same question
in the same minute; the mean of the ratios counts. A second target is the rounded model itself,
W4A8 in groups of 32, with n-gram drafts and 2-bit ones. Greedy answers are compared token by token.
Needs --data (or SALTIRE_DATA) for the questions. The protocol's answers have up to 1024 tokens;
--quick takes one question a category and 448.

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
from pathlib import Path

import torch
from harness import HERE, commit, device

from saltire.decode import DecodeStats, Session, SkipPlanner, open_session
from saltire.decode.drafts import ModelDraft, NgramDraft
from saltire.decode.text import encode_prompt, stop_tokens
from saltire.models import load_model
from saltire.models.decoder import build_decoder
from saltire.models.rounding import rounded_decoder
from saltire.ops.decoder_layer import PRIVATE

KEYS = {"auto": "auto", "ngram": "ngram", "clasp": "layer_skip", "quantised": "quantised"}
PLAN_EVERY = 8  # tokens that one plan serves where plans are judged


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


def decode_speed(stats: DecodeStats) -> float:
    """Tokens a second without the prefill, over all questions."""
    return stats.new_tokens / (stats.total_seconds - stats.prefill_seconds)


@torch.no_grad()
def plan_agreement(model, prompts, new: int, stop: list[int], most: int = 8) -> dict[str, float]:
    """Top-1 agreement of skipping drafts on the model's own answers, planned and static.

    The static sets are the individually best layers by the same measure on the same tokens: an
    advantage for them, for the plans see only what was decoded before.
    """
    decoder = build_decoder(model)
    planner = SkipPlanner(decoder, most)
    session = Session(decoder)
    texts = []
    for _, prompt in prompts:
        answer = session.generate([prompt], new, stop=stop).tokens[0]
        cache = decoder.new_cache(1, len(prompt) + len(answer) + 8)
        before, within = planner.trace(1), planner.trace(len(answer) - 1)
        decoder.prefill(cache, [prompt], trace=before)
        decoder.step(cache, [answer[:-1]], trace=within)
        texts.append((len(prompt), answer, cache, torch.cat([before, within], dim=1)))
    total = sum(len(answer) - 1 for _, answer, _, _ in texts)

    def agree(text, units, begin: int = 0, end: int | None = None) -> int:
        """Tokens of answer[begin + 1 : end + 1] that a draft from the token before would find."""
        base, answer, cache, _ = text
        places = range(begin, min(len(answer) - 1, end or len(answer)))
        # Each sees the verified prefix and itself, and leaves nothing behind: all at once.
        rows = [[answer[i], 0, base + i, PRIVATE, base + i, 0] for i in places]
        best = decoder.step_rows(cache, rows, range(len(rows)), units).best
        return sum(int(b) == answer[i + 1] for b, i in zip(best, places, strict=True))

    singles = torch.zeros(decoder.layers)
    for layer in range(decoder.layers):
        units = decoder.all_units.clone()
        units[layer] = 0
        singles[layer] = sum(agree(text, units) for text in texts)
    order = singles.argsort(descending=True).tolist()
    hits: dict[str, float] = defaultdict(float)
    for text in texts:
        base, answer, cache, trace = text
        for begin in range(0, len(answer) - 1, PLAN_EVERY):
            plans = planner.plans(cache, 0, base + begin - 1, trace[:, begin])
            for skipped in (4, 8):
                units = plans[skipped - 1].units
                name = f"plan_agreement_m{skipped}"
                hits[name] += agree(text, units, begin, begin + PLAN_EVERY)
    for skipped in (4, 8):
        static = decoder.all_units.clone()
        static[order[:skipped]] = 0
        hits[f"static_agreement_m{skipped}"] = sum(agree(text, static) for text in texts)
    return {name: value / total for name, value in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=os.environ.get("SALTIRE_DATA"), help="folder of data")
    parser.add_argument("--quick", action="store_true", help="fewer questions and tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new", type=int, default=0, help="tokens an answer has at most")
    parser.add_argument("--questions", type=int, default=0, help="of each category")
    parser.add_argument("--only", nargs="*", help="methods to compare; all if left out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.data:
        parser.error("give --data FOLDER (or SALTIRE_DATA): spec_bench/question.jsonl is in it")
    start = time.perf_counter()
    model, tokenizer = load_model()
    exact_model = model
    model = load_model()[0].to(torch.bfloat16)
    cheap, cheaper = rounded_decoder(exact_model), rounded_decoder(exact_model, bits=2)
    stop = stop_tokens(tokenizer)
    chosen = questions(options.data, options.questions or (1 if options.quick else 40))
    new = options.new or (448 if options.quick else 1024)
    limit = model.config.max_position_embeddings - new
    prompts = [(c, encode_prompt(tokenizer, text)[:limit]) for c, text in chosen]
    sessions = {
        "plain": open_session(model),
        "ngram": open_session(model, "ngram"),
        "clasp": open_session(model, "clasp"),
        "quantised": open_session(model, "quantised", cheap),
        "auto": open_session(model, "auto", cheap),
    }
    if options.only:
        sessions = {n: s for n, s in sessions.items() if n in ("plain", *options.only)}
    ratios, totals, mismatches = compare(sessions, prompts, new, stop)
    low_drafts = {"ngram": NgramDraft(), "quantised": ModelDraft(cheaper)}
    low = {"plain": Session(cheap), "auto": Session(cheap, low_drafts)}
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
                f"{target:5} {name:10} {statistics.mean(everything):.3f}x  behind the first token "
                f"{decode_speed(t[name]) / decode_speed(t['plain']):.3f}x  "
                f"tokens a step {stats['tokens_per_step']:.2f}  acceptance "
                f"{stats['acceptance']:.2f}  rounds {stats['rounds']}"
            )

    def mean(r, name: str) -> float:
        return statistics.mean(v for values in r[name].values() for v in values)

    agreement = {}
    if not options.only:
        few = prompts[:: max(1, len(prompts) // (3 if options.quick else 9))]
        agreement = plan_agreement(exact_model, few, 64, stop)
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
    keys = {f"{KEYS[name]}_speedup": mean(ratios, name) for name in ratios if name != "plain"}
    if "auto" in ratios:
        keys["auto_worst_category"] = min(statistics.mean(v) for v in ratios["auto"].values())
    if "clasp" in ratios:
        clasp = totals["clasp"]
        keys["layer_skip_acceptance"] = clasp.acceptance
        keys["plan_share"] = clasp.plan_seconds / clasp.total_seconds
    keys |= {
        "greedy_mismatches": mismatches + low_mismatches,
        "w4_auto_speedup": mean(low_ratios, "auto"),
        "w4_auto_worst_category": min(statistics.mean(v) for v in low_ratios["auto"].values()),
        **agreement,
    }
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({**{k: round(v, 3) for k, v in keys.items()}, **stamp, "seconds": seconds}))


if __name__ == "__main__":
    main()
