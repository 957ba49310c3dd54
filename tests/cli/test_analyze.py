"""``saltire analyze``: pictures and figures of a small model, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saltire.cli import build_app
from saltire.errors import SaltireError
from saltire.models.saving import save_checkpoint
from tests.tiny import tiny_model, tiny_tokenizer

runner = CliRunner()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("small") / "model"
    save_checkpoint(tiny_model("llama", vocab_size=259), tiny_tokenizer(), out)
    return out


def test_pictures_a_page_and_one_row_a_layer_and_rank(small: Path, tmp_path: Path) -> None:
    options = ["--out", str(tmp_path), "--samples", "2", "--length", "64", "--shares", "0.5,1"]
    options += ["--every", "1"]
    result = runner.invoke(build_app(), ["analyze", str(small), *options, "--json"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    facts = json.loads(result.stdout.splitlines()[-1])
    assert facts["measurements"] == len(facts["rows"]) == 2 * 7 * 2
    assert (tmp_path / "interaction.png").read_bytes().startswith(b"\x89PNG")
    assert "1.down_proj" in (tmp_path / "interaction.html").read_text()
    for row in facts["rows"]:
        assert row["lq"] ** 2 == pytest.approx(
            row["e_L"] ** 2 + row["e_factors"] ** 2 + 2 * row["inner"], rel=1e-3
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shares", "half"), "expected numbers"),
        (("--shares", "0.5,2"), r"in \(0, 1\]"),
        (("--gauge", "golden"), "gauge = 'golden'"),
        (("--every", "0"), "every = 0"),
    ],
)
def test_bad_options_are_refused(small: Path, tmp_path: Path, options, message) -> None:
    arguments = ["analyze", str(small), "--out", str(tmp_path), "--length", "32", *options]
    result = runner.invoke(build_app(), arguments)
    assert isinstance(result.exception, SaltireError)
    import re

    assert re.search(message, str(result.exception))
