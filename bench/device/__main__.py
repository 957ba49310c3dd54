"""Prove and measure the CUDA kernels on the present device: ``make device``.

Builds for its architecture, measures its ceilings, runs the tests marked ``cuda``, the benches and
compute-sanitizer, each in a process of its own with a time limit. Goes on after a failure, and then
ends with status 1. Writes bench/results/DEVICE.csv (rows of this run are appended) and
bench/results/DEVICE.txt (the report). Without a device, says so of each part and still ends well.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from bench.device.parts import BUILD, CEILINGS, ROOT, SITE, Part, all_parts

RESULTS = ROOT / "bench" / "results"
STAMP = ("time", "commit", "device", "part")


@dataclass
class Outcome:
    """What became of a part. state: done, failed, stopped (time was up) or not run, and why."""

    part: Part
    state: str
    why: str = ""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    last_line: str = ""


def device_facts() -> dict[str, str] | None:
    """Name and architecture of the first CUDA device, or None. Asked in a process of its own, so
    that this one holds no device memory."""
    code = (
        "import json, torch\n"
        "if torch.cuda.is_available():\n"
        "    p = torch.cuda.get_device_properties(0)\n"
        "    print(json.dumps({'name': p.name, 'arch': f'{p.major}{p.minor}'}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    facts: dict[str, str] | None = json.loads(done.stdout) if done.stdout.strip() else None
    if facts and facts["arch"] == "90":
        facts["arch"] = "90a"
    return facts


def missing(part: Part, device: dict[str, str] | None) -> str:
    """What the part needs and this machine lacks, or ""."""
    for need in part.needs:
        if need == "device" and device is None:
            return "no CUDA device"
        if need != "device" and shutil.which(need) is None:
            return f"no {need} on PATH"
    return ""


def run_part(part: Part, environment: dict[str, str]) -> Outcome:
    """Run the part's command and read what it told."""
    log = BUILD / f"{part.name}.log"
    start = time.monotonic()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                part.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                timeout=part.seconds, check=False,
            ).returncode  # fmt: skip
            state, why = ("done", "") if status == 0 else ("failed", f"status {status}")
        except subprocess.TimeoutExpired:
            state, why = "stopped", f"after {part.seconds} s"
        except OSError as error:
            state, why = "failed", str(error)
    outcome = Outcome(part, state, why, time.monotonic() - start)
    lines = log.read_text(errors="replace").splitlines()
    outcome.last_line = next((line for line in reversed(lines) if line.strip()), "")
    kinds = {"row": outcome.rows, "figure": outcome.figures, "failure": outcome.failures}
    for line in lines:
        kind, _, rest = line.partition(" ")
        if kind in kinds and rest.startswith("{"):
            kinds[kind].append(json.loads(rest))
    return outcome


def write_csv(name: str, stamp: dict[str, str], outcomes: list[Outcome]) -> None:
    """Append this run's rows and figures to the device's CSV."""
    path = RESULTS / f"{name}.csv"
    new = [
        {**stamp, "part": o.part.name, **entry} for o in outcomes for entry in (*o.rows, *o.figures)
    ]
    old = list(csv.DictReader(path.open())) if path.exists() else []
    columns = list(dict.fromkeys(column for entry in (*old, *new) for column in entry))
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns or STAMP)
        writer.writeheader()
        writer.writerows([*old, *new])
    temporary.replace(path)


def report_text(stamp: dict[str, str], outcomes: list[Outcome]) -> str:
    """The report: what ran, every figure against its target, every failure."""
    lines = [f"{key}: {value}" for key, value in stamp.items()]
    lines += ["", f"{'part':<22}{'state':<10}{'seconds':>8}  "]
    for o in outcomes:
        lines.append(f"{o.part.name:<22}{o.state:<10}{o.seconds:>8.1f}  {o.why}".rstrip())
        if o.state in ("failed", "stopped") and o.last_line:
            lines.append(f"    last line: {o.last_line[:200]}")
    figures = [(o.part.name, f) for o in outcomes for f in o.figures]
    if figures:
        lines += ["", f"{'figure':<58}{'value':>14}  target"]
    for part, f in figures:
        target = ""
        if f["at_least"] is not None:
            target = f">= {f['at_least']:g}"
        elif f["at_most"] is not None:
            target = f"<= {f['at_most']:g}"
        verdict = {True: "met", False: "MISSED", None: ""}[f["met"]]
        value = f"{f['value']:.4g} {f['unit']}".strip()
        lines.append(f"{part + ': ' + f['name']:<58}{value:>14}  {target} {verdict}".rstrip())
    failures = [(o.part.name, f) for o in outcomes for f in o.failures]
    if failures:
        lines += ["", "failures"]
    lines += [f"  {part}, {f['case']}: {f['error']}" for part, f in failures]
    return "\n".join(lines) + "\n"


def commit() -> str:
    """The checked-out commit, or what the caller says where there is no repository."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prove and measure the CUDA kernels on a device.")
    parser.add_argument("--only", nargs="*", metavar="PART", help="these parts alone")
    parser.add_argument(
        "--build", action="store_true", help="build for sm_90a without a device too"
    )
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    device = device_facts()
    name = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-") if device else "no-device"
    stamp = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device["name"] if device else "none: device parts were not run",
    }
    # SITE first: an editable install elsewhere must not shadow what was built for this device.
    path = os.pathsep.join([str(SITE), str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(":")
    environment = {**os.environ, "PYTHONPATH": path}
    outcomes: list[Outcome] = []
    for part in all_parts(device["arch"] if device else "90a"):
        if options.only and part.name not in options.only:
            continue
        why = missing(part, device)
        if part.name == "build" and device is None and not options.build:
            why = why or "no CUDA device; --build builds for sm_90a all the same"
        outcome = Outcome(part, "not run", why) if why else run_part(part, environment)
        print(f"{part.name:<22}{outcome.state:<10}{outcome.seconds:6.1f} s  {outcome.why}".rstrip())
        sys.stdout.flush()
        if part is CEILINGS:
            known = {figure["name"]: figure["value"] for figure in outcome.figures}
            environment["SALTIRE_CEILINGS"] = json.dumps(known)
        outcomes.append(outcome)
    text = report_text(stamp, outcomes)
    if device:
        write_csv(name, stamp, outcomes)
    (RESULTS if device else BUILD).joinpath(f"{name}.txt").write_text(text)
    print(f"\n{text}")
    bad = [o.part.name for o in outcomes if o.state in ("failed", "stopped")]
    print(
        f"device: {stamp['device']}; " + (f"failed: {', '.join(bad)}" if bad else "nothing failed")
    )
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
