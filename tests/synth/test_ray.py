"""``--engine ray`` on a cluster started here: the same bytes as one process, whoever dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from saltire.errors import SaltireError
from saltire.synth import jobs, synthesise
from saltire.synth.engine import run_all
from tests.synth.small_runs import corpus, digests, small

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _end_of_the_cluster():
    yield
    ray.shutdown()


def test_what_a_job_refuses_is_told_as_it_is(tmp_path: Path) -> None:
    def job(folder: str, number: int) -> None:
        raise SaltireError(f"job {number} of {folder} cannot be done.")

    with pytest.raises(SaltireError, match=f"^job 0 of {tmp_path} cannot be done.$"):
        run_all(job, str(tmp_path), [0], label="jobs", workers=2, engine="ray")


def test_a_run_whose_workers_are_killed_writes_what_one_process_writes(
    tmp_path, scorer, monkeypatch
) -> None:
    """One worker is killed before it embeds, one between a shard's samples and its sidecar."""
    source = str(corpus(tmp_path / "in.jsonl", 60))
    config = small(scorer, samples_per_shard=1)
    synthesise([source], tmp_path / "one", config)
    embedding, building = tmp_path / "embedding", tmp_path / "building"

    def embed(out: str, block: int) -> None:
        from saltire.synth.jobs import embed_block

        if not embedding.exists():
            embedding.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        embed_block(out, block)

    def build(out: str, shard: int) -> None:
        from saltire.synth import jobs

        write = jobs.write_shard

        def write_and_die(path: Path, samples: list) -> None:
            write(path, samples)
            building.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

        if shard == 2 and not building.exists():
            jobs.write_shard = write_and_die
        jobs.build_shard(out, shard)

    monkeypatch.setattr(jobs, "embed_block", embed)
    monkeypatch.setattr(jobs, "build_shard", build)
    synthesise([source], tmp_path / "ray", config, engine="ray", workers=2)
    killed = {int(path.read_text()) for path in (embedding, building)}
    assert len(killed) == 2
    assert os.getpid() not in killed
    assert digests(tmp_path / "one") == digests(tmp_path / "ray")
