"""Curves of runs: seeds become one band, columns find their panels, the page loads nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from saltire.cli import build_app
from saltire.errors import SaltireError
from saltire.report.curves import Panel, arrange, draw_png, write_page
from saltire.report.runs import read_groups


def make_run(folder: Path, seed: int, level: float = 1.0, steps: int = 4, **columns) -> Path:
    folder.mkdir(parents=True)
    settings = {
        "seed": seed,
        "output": str(folder),
        "task": {"kind": "countdown", "seed": seed},
        "entropy": {
            "schedule": {"kind": "constant", "level": level},
            "actuator": {"name": "entropy_bonus"},
        },
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    lines = [
        {"step": step, "entropy": level + seed + step, "target": level, "phase": "stable"}
        | {name: value for name, value in columns.items() if step % 2}
        for step in range(steps)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_runs_that_differ_in_their_seed_alone_become_one_band(tmp_path) -> None:
    for seed in (0, 2):
        make_run(tmp_path / "low" / f"seed-{seed}", seed, 1.0)
        make_run(tmp_path / "high" / f"seed-{seed}", seed, 5.0, steps=3 + seed)
    groups = {group.name: group for group in read_groups([str(tmp_path)])}
    assert sorted(groups) == ["high", "low"]
    curve = groups["low"].curve("entropy")
    assert curve is not None
    assert (curve.steps, curve.mean) == ([0, 1, 2, 3], [2.0, 3.0, 4.0, 5.0])
    assert (curve.low[0], curve.high[0], curve.seeds) == (1.0, 3.0, 2)
    shorter = groups["high"].curve("entropy")  # to where the shorter seed has come
    assert shorter is not None
    assert shorter.steps == [0, 1, 2]


def test_a_name_can_be_given_and_names_never_clash(tmp_path) -> None:
    a = make_run(tmp_path / "a" / "run", 0, 1.0)
    b = make_run(tmp_path / "b" / "run", 0, 2.0)
    assert [g.name for g in read_groups([str(a), str(b)])] == ["run (1)", "run (2)"]
    assert [g.name for g in read_groups([f"wsd={a}", str(b)])] == ["wsd", "run"]


def test_panels_take_the_columns_that_were_logged(tmp_path) -> None:
    one = read_groups([str(make_run(tmp_path / "x", 0, kl=0.0, **{"pass@1": 0.5, "pass@8": 0.75}))])
    pictures = {picture.title: picture for picture in arrange(one)}
    assert list(pictures) == ["entropy", "Pass@k, held out"]  # an idle KL term is left out
    assert [line.label for line in pictures["Pass@k, held out"].lines] == ["pass@1", "pass@8"]
    assert pictures["entropy"].lines[0].reference is not None
    make_run(tmp_path / "y", 0, 3.0, actuator=0.1, **{"pass@1": 0.5, "pass@8": 0.75})
    two = read_groups([str(tmp_path)])
    titles = [picture.title for picture in arrange(two)]
    assert "actuator: entropy bonus" in titles
    assert "Pass@k, held out: pass@8" in titles  # one panel a column, one line a group
    with pytest.raises(SaltireError, match="--columns: entropy, target"):
        arrange(two, [Panel("none", ("nowhere",))])


def test_a_run_of_self_play_shows_what_dept_saw(tmp_path) -> None:
    ends = {"share player 0": 0.25, "share player 1": 0.25, "share draw": 0.5}
    seen = {
        f"dept/boast/player {p}/{name}": 0.1
        for name in ("fast", "slow", "divergence", "lambda")
        for p in (0, 1)
    }
    logged = ends | seen | {"match_entropy": 0.9, "grad_norm": 0.2, "forfeits": 0.0}
    pictures = {
        p.title: [line.label for line in p.lines]
        for p in arrange(read_groups([str(make_run(tmp_path / "x", 0, **logged))]))
    }
    assert pictures["how matches end"] == ["player 0", "player 1", "draw"]
    assert pictures["push out of an impasse, λ"] == ["player 0", "player 1"]
    assert pictures["baselines"][:2] == ["player 0, fast", "player 1, fast"]
    assert {"entropy of how they end", "divergence of the baselines", "gradient norm"} <= set(
        pictures
    )
    assert "forfeits" not in pictures  # there were none


def test_picture_and_page_are_whole(tmp_path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / "a<b" / str(seed), seed, reward=0.25)
    groups = read_groups([str(tmp_path)])
    pictures = arrange(groups)
    draw_png(groups, pictures, tmp_path / "p.png")
    write_page(groups, pictures, "a<b", tmp_path / "p.html")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "p.html").read_text()
    assert "<h1>a&lt;b</h1>" in page
    assert "<td>reward</td><td>3</td><td>0.25</td>" in page
    for loading in ('href="http', "src=", "url(http", "<script", "@import"):
        assert loading not in page


def test_the_verb_draws_and_refuses(tmp_path) -> None:
    run = make_run(tmp_path / "x", 0, reward=0.25)
    runner = CliRunner()
    done = runner.invoke(
        build_app(), ["plot", str(run), "--out", str(tmp_path / "o.png"), "--json"]
    )
    assert done.exit_code == 0, done.output
    files = json.loads(done.stdout.splitlines()[-1])["files"]
    assert [Path(file).name for file in files] == ["o.png", "o.html"]
    assert all(Path(file).stat().st_size > 1000 for file in files)
    for arguments, message in (
        ([str(tmp_path / "absent")], "no folder"),
        ([str(tmp_path / "empty")], "holds no run"),
        ([str(run), "--columns", "nothing"], "--columns: entropy"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        result = runner.invoke(build_app(), ["plot", *arguments])
        assert isinstance(result.exception, SaltireError)
        assert message in str(result.exception)
    (run / "log.jsonl").write_text("")
    result = runner.invoke(build_app(), ["plot", str(run)])
    assert "no step yet" in str(result.exception)
