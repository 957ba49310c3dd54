"""What a stage of the demo is. To add one: write a file with a Stage and list it in STAGES."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from saltire.errors import SaltireError


@dataclass(frozen=True)
class Stage:
    """name: for ``--only``. title: one line for a person. run(folder, console) -> facts for --json.

    A stage writes below ``folder`` only, prints to ``console``, and can be run again.
    """

    name: str
    title: str
    run: Callable[[Path, Console], dict[str, Any]]


def fresh_process(*arguments: str) -> dict[str, Any]:
    """Run ``saltire ARGUMENTS --json`` in a new Python process; returns its JSON object."""
    command = [sys.executable, "-m", "saltire", *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SaltireError(f"`saltire {' '.join(arguments)}` failed with {done.returncode}.")
    result = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(result, dict)
    return result
