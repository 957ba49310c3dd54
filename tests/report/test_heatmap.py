"""Heat maps: whole files, every value on the page, nothing loaded from elsewhere."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

from saltire.errors import MissingExtraError, SaltireError
from saltire.report.heatmap import HeatMap, draw_png, write_page

MAP = HeatMap("e <L>", ["0.q", "0.k"], ["0.25", "0.5"], [[0.125, -0.5], [math.nan, 0.375]], True)


def test_a_picture_is_a_png(tmp_path: Path) -> None:
    draw_png([MAP, MAP], "title", "rank", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["map.png"]


def test_a_page_holds_every_value_and_loads_nothing(tmp_path: Path) -> None:
    write_page([MAP], "a & b", "rank", ["note <1>"], tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text()
    for text in ("0.125", "-0.500", "0.375", "e &lt;L&gt;", "a &amp; b", "note &lt;1&gt;"):
        assert text in page
    assert "nan" not in page.replace("data:image/png;base64", "").split("<table>")[1]
    assert "http" not in page


def test_values_that_do_not_fit_the_labels_are_refused() -> None:
    with pytest.raises(SaltireError, match="expected 2 rows of 1"):
        HeatMap("x", ["a", "b"], ["c"], [[1.0]])


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"saltire\[report\]"):
        draw_png([MAP], "title", "rank", tmp_path / "map.png")
