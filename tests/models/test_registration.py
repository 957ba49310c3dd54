"""``import saltire`` registers with transformers, in whatever order things are imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECK = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; "
ORDERS = {
    "saltire first": "import saltire; from transformers import AutoModelForCausalLM",
    "the registry first": "import transformers.quantizers.auto; import saltire",
    "transformers' lazy package first": "import transformers; import saltire",
    "by way of the models": "from saltire.models import load_model",
    "twice": "import saltire; saltire._register()",
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_saltire_is_known_to_transformers(order: str) -> None:
    code = f"{order}; {CHECK} assert 'saltire' in known"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_saltire_does_not_import_transformers() -> None:
    code = "import sys, saltire, saltire.cli; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
