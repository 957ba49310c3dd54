"""The report of a quantised model: what it measures, and that the page stands alone."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from saltire.errors import SaltireError
from saltire.quant import quantize
from saltire.quant.observe import MatrixView, Views, _share_lost
from saltire.report.quantisation import write_report
from tests.tiny import random_tokens, tiny_model


def test_a_view_names_the_loudest_channel_and_keeps_its_peak() -> None:
    matrix = torch.randn(300, 100)
    matrix[:, 37] *= 50
    view = MatrixView.of(matrix)
    channel, loudness = view.channels[0]
    assert channel == 37
    rms = matrix.square().mean().sqrt()
    assert loudness == pytest.approx(float(matrix[:, 37].square().mean().sqrt() / rms), rel=1e-5)
    assert float(view.cells.max()) == pytest.approx(float(matrix.abs().max() / rms), rel=1e-5)
    assert view.cells.shape == (64, 64)


def test_the_page_tells_of_every_linear_and_loads_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 40.0  # one loud channel into q, k, v
    views = Views()
    quantize(model, None, "w4a4", random_tokens(model, 4, 32), batch=2, observer=views)
    assert [view.block for view in views.linears] == [0] * 7 + [1] * 7
    q = next(view for view in views.linears if view.name.endswith("q_proj"))
    assert q.activation[0].channels[0][0] == 5
    assert q.activation[1].entropy < 0.3 * q.activation[0].entropy, "the transform flattens"
    assert 0 < q.error < 0.5
    assert (q.weight_bits, q.act_bits) == (4, 4)
    assert 0 < views.blocks[0].error < 1
    write_report(views, "tiny <model>", {"recipe": "w4a4"}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<details>") == 2
    assert page.count("q_proj</td>") == 2
    assert "tiny &lt;model&gt;" in page
    assert not re.search(r"(src|href)=.(?!data:)", page), "the page would load something"
    assert "url(" not in page


@pytest.mark.parametrize(
    "zeroed",
    [
        ["mlp.up_proj"],
        ["self_attn.o_proj", "mlp.down_proj"],
        ["input_layernorm", "post_attention_layernorm"],
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_layer_of_zeros_is_shown_without_nan(tmp_path: Path, zeroed: list[str]) -> None:
    pytest.importorskip("matplotlib")
    model = tiny_model("llama")
    with torch.no_grad():
        for name in zeroed:
            for layer in model.model.layers:
                layer.get_submodule(name).weight.zero_()
    views = Views()
    quantize(model, None, "w4a4", random_tokens(model, 4, 32), batch=2, observer=views)
    if len(zeroed) == 2:
        assert [view.error for view in views.blocks] == [0.0, 0.0]
    write_report(views, "tiny", {}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text().split("</style>")[1]
    shown = re.sub(r"<[^>]*>", "", page)
    assert not re.search(r"nan\b|inf\b", shown)
    assert "n/a → n/a" in shown


def test_a_zero_that_becomes_something_has_no_relative_error() -> None:
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    assert _share_lost(zeros, zeros) == 0.0
    assert math.isnan(_share_lost(zeros, ones))
    assert _share_lost(ones, zeros) == pytest.approx(1.0)


def test_a_report_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SaltireError, match="no layer was quantised"):
        write_report(Views(), "empty", {}, tmp_path / "report.html")
