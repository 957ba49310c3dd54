"""What a part tells the driver: timings, and figures with their targets, as printed lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def row(case: str, variant: str, seconds: float, spread: float = 0.0, **more: Any) -> None:
    """One timing of ``variant`` in ``case``: the median and the spread of its rounds."""
    _tell("row", case=case, variant=variant, median_us=round(seconds * 1e6, 3),
          spread=round(spread, 3), **more)  # fmt: skip


def figure(name: str, value: float, at_least: float | None = None, at_most: float | None = None,
           unit: str = "") -> None:  # fmt: skip
    """A number that the project has a target for."""
    met = None
    if at_least is not None:
        met = value >= at_least
    elif at_most is not None:
        met = value <= at_most
    _tell("figure", name=name, value=round(value, 4), unit=unit, at_least=at_least,
          at_most=at_most, met=met)  # fmt: skip


def failed(case: str, error: Exception) -> None:
    """A case that could not be measured; the others go on, and the part ends with status 1."""
    text = str(error).strip() or type(error).__name__
    _tell("failure", case=case, error=text.splitlines()[0][:300])
    _FAILURES.append(case)


_FAILURES: list[str] = []


def attempt(case: str, measure: Callable[[], object]) -> None:
    """Measure a case; if it fails, tell so and go on."""
    try:
        measure()
    except Exception as error:
        failed(case, error)


def finish() -> None:
    """End the part; status 1 if a case failed."""
    sys.exit(1 if _FAILURES else 0)


def ceiling(name: str) -> float:
    """A ceiling that the driver measured first and hands on, in bytes or operations a second.

    NaN where it is not known, so that shares of it are NaN too.
    """
    return float(json.loads(os.environ.get("SALTIRE_CEILINGS", "{}")).get(name, "nan"))


def _tell(kind: str, **what: Any) -> None:
    print(kind, json.dumps(what), flush=True)
