"""Where jobs run: in this process, in worker processes of this machine, or on Ray Data.

A job is a function of a folder and a number that writes a whole file and can be run again, so a
worker that dies costs its job's time and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from saltire.errors import MissingExtraError, SaltireError
from saltire.progress import track

Job = Callable[[str, int], None]
ENGINES = ("local", "ray")
BREAKDOWNS = 3  # deaths of workers without a finished job between them, before giving up


def run_all(
    job: Job, folder: str, numbers: Sequence[int], *, label: str, workers: int, engine: str
) -> None:
    """Run ``job(folder, number)`` for all numbers, in any order.

    workers: processes; torch's threads are shared out among them. engine: ``local`` or ``ray``
    (the cluster of RAY_ADDRESS, else one started here; the folder must be the same everywhere).
    Raises what a job raises, and SaltireError when workers keep dying.
    """
    if not numbers:
        return
    if engine == "ray":
        done = _on_ray(job, folder, numbers, workers)
    elif workers == 1:
        done = (_run(job, folder, number) for number in numbers)
    else:
        done = _in_processes(job, folder, numbers, workers)
    for _ in track(done, label, total=len(numbers)):
        pass


def _run(job: Job, folder: str, number: int) -> int:
    job(folder, number)
    return number


def _threads_of(workers: int) -> int:
    return max(1, torch.get_num_threads() // workers)


def _in_processes(job: Job, folder: str, numbers: Sequence[int], workers: int) -> Iterator[int]:
    left, breakdowns = list(numbers), 0
    # A fork would copy torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    while left:
        pool = ProcessPoolExecutor(
            min(workers, len(left)),
            mp_context=context,
            initializer=torch.set_num_threads,
            initargs=(_threads_of(workers),),
        )
        with pool:
            futures = [pool.submit(_run, job, folder, number) for number in left]
            try:
                for future in as_completed(futures):
                    left.remove(future.result())
                    breakdowns = 0
                    yield left[0] if left else -1
            except BrokenProcessPool:
                breakdowns += 1
                if breakdowns == BREAKDOWNS:
                    raise SaltireError(
                        f"workers died {breakdowns} times in a row, {len(left)} jobs are left. "
                        "The likely cause is memory: use fewer --workers and --resume."
                    ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _on_ray(job: Job, folder: str, numbers: Sequence[int], workers: int) -> Iterator[int]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingExtraError("ray", "ray", "--engine ray") from None
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        options = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, **options)
    ray.data.DataContext.get_current().enable_progress_bars = False
    threads = _threads_of(workers)

    def run(row: dict[str, int]) -> dict[str, int | str]:
        torch.set_num_threads(threads)
        refusal = ""
        try:
            job(folder, int(row["item"]))
        except SaltireError as error:  # Ray Data would wrap it, and lose what it wraps on the way
            refusal = str(error)
        return {"item": row["item"], "refusal": refusal}

    rows = ray.data.from_items(
        [{"item": number} for number in numbers], override_num_blocks=len(numbers)
    )
    for row in rows.map(run, num_cpus=1).iter_rows():
        if row["refusal"]:
            raise SaltireError(row["refusal"])
        yield int(row["item"])
