"""Fixtures and switches that every test shares."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach a hub

from saltire.ops import best_isa, force_isa
from saltire.ops.isa import ISAS

AVAILABLE_ISAS = ISAS[: ISAS.index(best_isa()) + 1]


@pytest.fixture(params=AVAILABLE_ISAS)
def isa(request: pytest.FixtureRequest):
    """Runs the test once for every instruction set that this machine has."""
    with force_isa(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _same_random_numbers_every_time() -> None:
    torch.manual_seed(0)
