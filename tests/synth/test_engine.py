"""Worker processes of this machine: one that dies costs its job's time, all that die are told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from saltire.errors import SaltireError
from saltire.synth.engine import run_all


def dies_once(folder: str, number: int) -> None:
    """Job 2 kills its process at the first attempt; every job that ends leaves a file."""
    died = Path(folder) / "died"
    if number == 2 and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (Path(folder) / f"done-{number}").touch()


def dies_always(folder: str, number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuses(folder: str, number: int) -> None:
    raise SaltireError(f"job {number} cannot be done.")


def test_a_job_whose_worker_is_killed_is_run_again(tmp_path: Path) -> None:
    run_all(dies_once, str(tmp_path), range(5), label="jobs", workers=2, engine="local")
    assert (tmp_path / "died").exists()
    assert len(list(tmp_path.glob("done-*"))) == 5


@pytest.mark.slow
def test_workers_that_keep_dying_are_told_with_the_likely_cause(tmp_path: Path) -> None:
    with pytest.raises(SaltireError, match=r"died 3 times in a row, 2 jobs are left.*memory"):
        run_all(dies_always, str(tmp_path), [0, 1], label="jobs", workers=2, engine="local")


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_job_refuses_is_told_as_it_is(tmp_path: Path, workers: int) -> None:
    with pytest.raises(SaltireError, match=r"^job 7 cannot be done\.$"):
        run_all(refuses, str(tmp_path), [7], label="jobs", workers=workers, engine="local")
