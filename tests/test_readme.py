"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saltire.errors import SaltireError
from saltire.models.default import default_model_path

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def have_default_model() -> bool:
    try:
        return default_model_path().exists()
    except SaltireError:
        return False


def test_there_is_something_to_paste() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.skipif(not have_default_model(), reason="the default model is not installed")
@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {i}" for i in range(len(BLOCKS))])
def test_a_pasted_block_runs(block: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(README), "exec"), {})
    assert capsys.readouterr().out.strip()
