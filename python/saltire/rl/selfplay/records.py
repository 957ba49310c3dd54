"""What the log says of a step of self-play, over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from saltire.rl.control import Reading
from saltire.rl.dept import match_entropy
from saltire.rl.distributed import all_sum
from saltire.rl.selfplay.collect import Played
from saltire.rl.step import UpdateStats


def match_record(played: Played, outcomes: Sequence[str]) -> dict[str, float]:
    """Rewards, lengths, forfeits, and how matches ended; outcomes: all that the game can have."""
    ends = Counter(record.outcome for record in played.records)
    rewards = [r for outcome in played.outcomes() for r in outcome.rewards]
    sums = all_sum(
        [
            len(played.records),
            len(played.crashed),
            sum(bool(record.forfeits) for record in played.records),
            sum(len(record.turns) for record in played.records),
            sum(rewards),
            len(rewards),
            len(played.turns),
            sum(len(turn.completion) for turn in played.turns),
            *(ends[outcome] for outcome in outcomes),
        ]
    )
    matches, crashed, forfeits, replies, reward, seats, turns, tokens, *counts = sums
    record = {
        "reward": reward / seats,
        "matches": matches,
        "crashed": crashed,
        "forfeits": forfeits / matches,
        "replies": replies / matches,
        "length": tokens / turns,
        "match_entropy": match_entropy(counts),
    }
    shares = zip(outcomes, counts, strict=True)
    return record | {f"share {label}": count / matches for label, count in shares}


def update_record(
    stats: Sequence[UpdateStats], played: Played, advantages: Tensor
) -> dict[str, float]:
    """Advantages as they went into the updates, and the updates' own figures."""
    total, size, count = all_sum(
        [float(advantages.sum()), float(advantages.abs().sum()), len(played.turns)]
    )
    record = {"advantage": total / count, "advantage_size": size / count}
    for name in ("loss", "clipped_high", "clipped_low", "grad_norm"):
        record[name] = sum(getattr(s, name) for s in stats) / len(stats)
    return record


def control_record(reading: Reading | None) -> dict[str, Any]:
    """What the control of entropy saw and set; nothing where there is none."""
    if reading is None:
        return {}
    return {
        "target": reading.target,
        "error": reading.error,
        "actuator": reading.setting,
        "saturated": reading.saturated,
        "phase": reading.phase,
    }
