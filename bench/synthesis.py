"""Re3Syn on texts whose true order is known, its judge, its optimiser, its scoring.

Ground truth: articles of WikiText-2 are cut into sections, three articles are mixed in a group, and
every ordering is asked to give back article and order (Kendall's tau, adjacent sections, purity;
95% bootstrap intervals over articles). The judge, which is no kin of the scorer, reads the samples
that the orders make, by bucket of position. WikiText-2 is read from SALTIRE_DATA.

Keys: lop16_ms (<= 25), path16_ms (<= 80), exact_unlike_brute_force (0 of 400, n = 8),
search64_share_of_best (>= 0.99), pair_scoring_vs_naive (>= 3), pair_scoring_extra_mb (<= 300),
tau_ORDER, adjacent_ORDER, purity_ORDER, tau_gain_over_ORDER with _low and _high, retrieved_purity,
direction_snr, judge_nll_ORDER, judge_gain_over_ORDER with _low and _high, copy_rate,
minutes_of_2000 (<= 15; 2,000 documents to samples of 8k tokens; --quick: 100 documents, times 20),
retrieval_mb_2k and retrieval_mb_20k (about equal). --only picks parts.
"""

from __future__ import annotations

import argparse

import torch
from harness import Report
from sections.scale import whole_runs
from sections.speed import order_optimiser, pair_scoring
from sections.truth import ground_truth, judged, scored_groups

PARTS = ("order", "pairs", "truth", "judge", "scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer groups, the same method")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = Report("synthesis", options.quick)
    if "order" in options.only:
        order_optimiser(report, options.quick)
    if "pairs" in options.only:
        pair_scoring(report, options.quick)
    if {"truth", "judge"} & set(options.only):
        groups = scored_groups(options.quick)
        if "truth" in options.only:
            ground_truth(report, groups)
        if "judge" in options.only:
            judged(report, groups)
    if "scale" in options.only:
        whole_runs(report, options.quick, options.threads)
    report.finish()


if __name__ == "__main__":
    main()
