"""The whole run: ingest, drop duplicates, embed, find neighbours, group; then shard by shard score,
order, pack and write; then the manifest and the statistics.

Every stage writes whole files and is passed over when they are there. Nothing that is written
depends on time, on the number of workers or on interruptions, so a run that was killed and resumed
equals one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saltire import __version__
from saltire.errors import SaltireError
from saltire.files import replacing_file
from saltire.models.loading import load_tokenizer
from saltire.synth import jobs
from saltire.synth.config import SynthConfig, differences
from saltire.synth.dependency import signal_to_noise
from saltire.synth.duplicates import keep_first
from saltire.synth.encode import load_encoder
from saltire.synth.engine import ENGINES, run_all
from saltire.synth.groups import Budget, form_samples
from saltire.synth.jobs import BLOCK, NATS, Work
from saltire.synth.neighbours import nearest
from saltire.synth.pack import make_separator
from saltire.synth.read import Problems, describe_source, find_sources
from saltire.synth.store import DocumentStore, ingest
from saltire.synth.write import check_format, save_dataset, shard_file


def synthesise(
    inputs: Sequence[str],
    out: str | Path,
    config: SynthConfig | None = None,
    *,
    resume: bool = False,
    workers: int = 1,
    engine: str = "local",
    cache: str | Path | None = None,
) -> dict[str, Any]:
    """Turn documents into long samples in ``out``; returns the statistics, seconds and memory.

    inputs: files, folders or datasets. resume: go on with a run that was cut off; refused if
    anything that decides the result has changed. workers, engine: see ``run_all``. cache: a file of
    scores to share between runs; default inside the run. Raises SaltireError.
    """
    config = _resolved(config or SynthConfig())
    if engine not in ENGINES or workers < 1:
        raise SaltireError(
            f"engine = {engine!r}, workers = {workers}; expected local or ray, at least 1 worker."
        )
    sources = find_sources(inputs)
    work = Work(Path(out))
    asked = {
        "config": config.to_json(),
        "inputs": [describe_source(source) for source in sources],
        "version": __version__,
    }
    if _begin(work, asked, resume, Path(cache) if cache else work.folder / "scores.sqlite"):
        return {**json.loads((work.out / "stats.json").read_text()), "seconds": {}, "resumed": True}
    check_format(config.format)
    seconds: dict[str, float] = {}
    problems = Problems(config.strict)
    jobs.forget()

    def everywhere(job: Any, numbers: Sequence[int], label: str) -> None:
        run_all(job, str(work.out), numbers, label=label, workers=workers, engine=engine)

    with _timed(seconds, "ingest"):
        tokenizer = load_tokenizer(config.tokenizer or config.scorer)
        separator = make_separator(config.separator, tokenizer)
        counts = ingest(
            sources,
            work.documents,
            tokenizer,
            text_key=config.text_key,
            most_tokens=config.target_tokens - (separator.tokens if separator.closes else 0),
            split=config.split,
            problems=problems,
        )
        _refuse_nothing(counts, problems, config)
        store = DocumentStore(work.documents)
        if not work.keep.exists():
            with replacing_file(work.keep) as temporary, temporary.open("wb") as file:
                np.save(file, keep_first(store, config.near_duplicate))
        keep = np.load(work.keep)
    with _timed(seconds, "embed"):
        load_encoder(config.encoder)  # what is missing is told once, here
        blocks = range(-(-len(keep) // BLOCK))
        missing = [b for b in blocks if not (work.vectors / f"{b:06d}.npy").exists()]
        everywhere(jobs.embed_block, missing, "embedding")
    with _timed(seconds, "group"):
        if not work.samples.exists():
            ids, cosines = nearest(work.vectors, len(blocks), config.neighbours)
            tokens = store.index["tokens"][keep].astype(np.int64)
            closing = separator.tokens if separator.closes else 0
            budget = Budget(
                config.target_tokens - closing,
                separator.tokens,
                config.group_size,
                config.max_uses,
            )
            samples = form_samples(ids, cosines, tokens, budget, config.max_similarity)
            jobs.save_samples(work.samples, list(samples))
        with np.load(work.samples) as file:
            count = len(file["samples"]) - 1
    with _timed(seconds, "build"):
        shards = range(-(-count // config.samples_per_shard))
        missing = [s for s in shards if not work.sidecar(s).exists()]
        everywhere(jobs.build_shard, missing, "scoring, ordering, packing")
    with _timed(seconds, "finish"):
        stats = _statistics(work, config, counts, problems, len(keep), shards)
        _finish(work, config, asked, stats, shards)
    jobs.forget()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {**stats, "seconds": seconds, "resumed": resume, "peak_rss_mb": round(peak)}


def _resolved(config: SynthConfig) -> SynthConfig:
    """``auto`` made definite, so that a resumed run cannot differ."""
    if config.scorer_dtype != "auto":
        return config
    fast = torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported()
    return dataclasses.replace(config, scorer_dtype="bfloat16" if fast else "float32")


def _begin(work: Work, asked: dict[str, Any], resume: bool, cache: Path) -> bool:
    """Check and make the output folder; True if it holds the finished run already."""
    manifest, run = work.out / "manifest.json", work.folder / "run.json"
    try:
        occupied = work.out.exists() and any(work.out.iterdir())
        if occupied and not resume:
            what = "a finished run" if manifest.exists() else "something"
            what = "an unfinished run" if run.exists() and not manifest.exists() else what
            raise SaltireError(
                f"{work.out} holds {what}. Add --resume to go on with it, or give another folder."
            )
        if occupied:
            known = next((p for p in (manifest, run) if p.exists()), None)
            if known is None:
                raise SaltireError(f"{work.out} holds no run of saltire synth to resume.")
            old = json.loads(known.read_text())
            _refuse_other(work, old, asked)
            if known == manifest:
                shutil.rmtree(work.folder, ignore_errors=True)
                return True
        work.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaltireError(
            f"cannot use {work.out} as the output: {reason}. Choose another place."
        ) from None
    except json.JSONDecodeError as error:
        raise SaltireError(f"{work.out} cannot be resumed: {error}. Give another folder.") from None
    with replacing_file(run) as temporary:
        temporary.write_text(json.dumps({**asked, "cache": str(cache)}))
    return False


def _refuse_other(work: Work, old: dict[str, Any], asked: dict[str, Any]) -> None:
    changed = differences(old["config"], asked["config"])
    changed += differences(
        {"inputs": old["inputs"], "version": old["version"]},
        {"inputs": asked["inputs"], "version": asked["version"]},
    )
    if changed:
        raise SaltireError(
            f"{work.out} was begun with other settings: {'; '.join(changed)}. "
            "Use those, or give another folder."
        )


def _refuse_nothing(counts: dict[str, Any], problems: Problems, config: SynthConfig) -> None:
    if counts["documents"]:
        return
    if counts["longer_than_target"]:
        raise SaltireError(
            f"all {counts['longer_than_target']} documents are longer than "
            f"{config.target_tokens} tokens. Use --split, or a larger --target-tokens."
        )
    skipped = ", ".join(f"{n} {kind}" for kind, n in sorted(problems.counts.items()))
    raise SaltireError(f"the inputs hold no documents{f' ({skipped})' if skipped else ''}.")


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 2)


def _statistics(
    work: Work,
    config: SynthConfig,
    counts: dict[str, Any],
    problems: Problems,
    kept: int,
    shards: range,
) -> dict[str, Any]:
    facts = [json.loads(work.sidecar(shard).read_text()) for shard in shards]

    def total(name: str) -> Any:
        return sum(fact[name] for fact in facts)

    tokens = np.array([t for fact in facts for t in fact["tokens"]])
    bins = np.histogram(tokens / config.target_tokens, 20, (0, 1))[0]
    edges, forward = total("edges"), total("forward_nats")
    return {
        "rows": counts["rows"],
        "skipped": dict(sorted(problems.counts.items())),
        "skipped_places": dict(sorted(problems.places.items())),
        "exact_duplicates": counts["exact_duplicates"],
        "near_duplicates": counts["documents"] - kept,
        "longer_than_target": counts["longer_than_target"],
        "cut": counts["cut"],
        "documents": total("documents"),
        "samples": total("samples"),
        "tokens": int(tokens.sum()),
        "fill": float(tokens.mean() / config.target_tokens),
        "length_histogram": bins.tolist(),
        "groups": total("groups"),
        "exactly_ordered": total("exact"),
        "objective": total("objective"),
        "bound": total("bound"),
        "edges": edges,
        "mean_gain": total("gain_sum") / edges if edges else 0.0,
        "gain_range": NATS[:2],
        "gain_histogram": np.sum([fact["gain_histogram"] for fact in facts], axis=0).tolist(),
        "mean_distance": total("forward_nat_tokens") / forward if forward else 0.0,
        "far_share": total("far_nats") / forward if forward else 0.0,
        "copy_rate": total("copy_rate") / total("samples"),
        "direction_snr": signal_to_noise(total("direction_squared"), total("direction_noise")),
    }


def _finish(
    work: Work, config: SynthConfig, asked: dict[str, Any], stats: dict[str, Any], shards: range
) -> None:
    """Statistics and manifest, the manifest last: with it the run is finished."""
    paths = [shard_file(work.data, shard, config.format) for shard in shards]
    if config.format == "dataset":
        save_dataset(paths, work.out / "dataset", work.folder / "datasets")
    files = [
        {"name": f"data/{path.name}", "bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
    ]
    for name, content in (("stats", stats), ("manifest", {**asked, "files": files})):
        with replacing_file(work.out / f"{name}.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1))
    shutil.rmtree(work.folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
