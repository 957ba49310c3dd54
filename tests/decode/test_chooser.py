"""The chooser on a simulated machine: it finds the faster way, and leaves what does not pay."""

from __future__ import annotations

import random

import pytest

from saltire.decode.chooser import Arm, Chooser


def simulate(
    acceptance: float, cost: float, rounds: int = 400, drift: float = 0.0, seed: int = 0
) -> tuple[float, float]:
    """Speed over plain decoding of one arm of that acceptance and cost, and its share of rounds;
    drafts are of one confidence, a row takes 5% of a plain step."""
    chance = random.Random(seed)
    chooser = Chooser({"arm": Arm(8, cost)})
    tokens, time, plain, used = 0, 0.0, 0.0, 0
    for i in range(rounds):
        second = 0.01 * (1 + drift * (i // 40 % 2))  # the machine's speed comes and goes
        choice = chooser.choose({"arm": (8, 0)})
        stands = 1.0
        offered = 0
        while offered < choice.length:
            offered += 1
            stands *= float(choice.survival[12])
            if stands < choice.worth:
                break
        accepted = 0
        while accepted < offered and chance.random() < acceptance:
            accepted += 1
        draft, step = offered * cost * second, (1 + 0.05 * offered) * second
        chooser.saw_step(1 + offered, step)
        if choice.length:
            shares = [0.8] * offered
            chooser.saw_draft("arm", 0, offered, accepted, shares, draft, step)
            used += 1
        tokens += 1 + accepted
        time += draft + step
        plain += (1 + accepted) * second
    return plain / time, used / rounds


@pytest.mark.parametrize("drift", [0.0, 0.8])
def test_a_good_draft_is_used_at_a_good_length(drift: float) -> None:
    speed, used = simulate(0.85, 0.25, drift=drift)
    best = max(
        sum(0.85**i for i in range(n + 1)) / (1 + n * 0.30) for n in range(9)
    )  # the theory's best fixed length
    assert speed > 0.93 * best
    assert used > 0.9


@pytest.mark.parametrize("drift", [0.0, 0.8])
@pytest.mark.parametrize(("acceptance", "cost"), [(0.3, 0.3), (0.7, 0.8), (0.0, 0.3)])
def test_a_draft_that_does_not_pay_costs_little(
    acceptance: float, cost: float, drift: float
) -> None:
    speed, used = simulate(acceptance, cost, drift=drift)
    assert speed > 0.97
    assert used < 0.15


def test_a_hopeless_arm_is_never_tried() -> None:
    """At 90% of a plain step a token, even the acceptance hoped for cannot pay."""
    assert simulate(1.0, 0.9)[1] == 0.0


def test_a_simpler_arm_is_kept_unless_another_is_clearly_better() -> None:
    chooser = Chooser({"simple": Arm(8, 0.30), "other": Arm(8, 0.295)})
    chooser.saw_step(1, 0.01)
    assert chooser.choose({"simple": (8, 0), "other": (8, 0)}).name == "simple"
    assert chooser.choose({"simple": (0, 0), "other": (8, 0)}).name == "other"


def test_long_matches_of_the_text_are_followed_further() -> None:
    chooser = Chooser({"ngram": Arm(8)})
    chooser.saw_step(1, 0.01)
    for _ in range(40):
        chooser.saw_draft("ngram", 2, 3, 0, (), 0.0, 0.0115)
        chooser.saw_draft("ngram", 6, 8, 8, (), 0.0, 0.014)
    assert chooser.choose({"ngram": (8, 2)}).name == "none"
    assert chooser.choose({"ngram": (8, 6)}).length == 8
    assert chooser.choose({"ngram": (5, 6)}).length == 5
