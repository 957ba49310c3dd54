"""The toys: plain self-play dies in the forced draw, DEPT's gradient lives and it gets out."""

from __future__ import annotations

from pathlib import Path

import pytest

from saltire.report.impasse import plot_toys
from saltire.rl.impasse_toys import TOYS, Standoff, estimator, run_toy


@pytest.fixture(scope="module")
def runs() -> dict[str, list]:
    kinds = ("dept", "rae")
    return {k: [run_toy(Standoff(), estimator(k), s) for s in range(5)] for k in kinds}


def test_dept_leaves_the_forced_draw_where_a_role_average_stays(runs) -> None:
    assert sum(run.left() for run in runs["dept"]) >= 4
    assert sum(run.left() for run in runs["rae"]) <= 1


def test_gradients_of_dept_live_where_a_role_averages_die(runs) -> None:
    stuck = [run.lowest_norm() for run in runs["rae"] if not run.left()]
    assert max(stuck) < 0.01
    assert min(run.lowest_norm() for run in runs["dept"]) > 0.1


@pytest.mark.parametrize("toy", TOYS, ids=lambda toy: toy.name)
def test_a_seed_repeats_its_run(toy) -> None:
    one, two = (run_toy(toy, estimator("dept"), 3, steps=40) for _ in range(2))
    assert (one.norms, one.shares) == (two.norms, two.shares)
    assert all(abs(sum(shares) - 1) < 1e-9 for shares in one.shares)


def test_the_picture_is_whole(runs, tmp_path: Path) -> None:
    plot_toys({"DEPT": runs["dept"], "average per role": runs["rae"]}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[-8:-4] == b"IEND"
