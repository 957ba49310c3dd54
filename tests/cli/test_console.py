"""What the command prints when something is wrong."""

from __future__ import annotations

import pytest
import typer

from saltire.cli import _console
from saltire.errors import MissingExtraError


def test_an_error_names_the_extra_in_full(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def verb() -> None:
        raise MissingExtraError("trl", "rl", "training")

    monkeypatch.setattr("sys.argv", ["saltire"])
    with pytest.raises(SystemExit) as stopped:
        _console.run(app)
    assert stopped.value.code == 2
    assert "pip install 'saltire[rl]'" in capsys.readouterr().err
