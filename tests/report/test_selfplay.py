"""The picture of a self-play run."""

from __future__ import annotations

import pytest

from saltire.errors import SaltireError
from saltire.report.selfplay import plot_selfplay


def test_the_picture_is_whole_with_dept_and_without(tmp_path) -> None:
    plain = {"entropy": 1.0, "match_entropy": 0.5, "share draw": 0.7, "share player 0": 0.3}
    dept = {f"dept/g/player 0/{name}": 0.1 for name in ("fast", "slow", "divergence", "lambda")}
    for name, record in (("a", plain), ("b", plain | dept | {"grad_norm": 0.2, "reward": 0.0})):
        plot_selfplay([{"step": step, **record} for step in range(3)], tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[-8:-4] == b"IEND"
    with pytest.raises(SaltireError, match="not of self-play"):
        plot_selfplay([{"step": 0, "entropy": 1.0}], tmp_path / "c.png")
