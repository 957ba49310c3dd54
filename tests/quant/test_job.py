"""Jobs that are killed, resumed, streamed, divided: the same bits in the end, or a refusal."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from saltire.errors import SaltireError
from saltire.quant import RECIPES
from saltire.quant import quantize as quantize_model
from saltire.quant.activations import ActivationFile
from saltire.quant.job import Job, run
from tests.tiny import random_tokens, tiny_model, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests a while. " * 60


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A model of three blocks and a text on disk, and what to make of them."""
    model = tiny_model("llama", vocab_size=259, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = RECIPES["w4a4kv4"]
    text = str(tmp_path / "text.txt")
    return Job(str(tmp_path / "model"), tmp_path / "out", recipe, text, 8, 64)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_same(a: Path, b: Path) -> None:
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Kill:
    """An observer that ends the run after a block, before or after the block was advanced."""

    def __init__(self, block: int, after: bool) -> None:
        self.block, self.late = block, after

    def before(self, index: int, block: object, runner: object) -> None:
        if index == self.block and not self.late:
            raise KeyboardInterrupt

    def after(self, index: int, block: object, runner: object) -> None:
        if index == self.block and self.late:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stream", [False, True])
def test_a_killed_job_resumes_to_the_same_bits(job: Job, stream: bool) -> None:
    job = replace(job, stream=stream)
    run(replace(job, out=job.out.with_name("whole")))
    for block, late in ((0, True), (1, False), (2, True)):
        with pytest.raises(KeyboardInterrupt):
            run(replace(job, resume=job.directory.exists()), Kill(block, late))
        assert not job.out.exists()
    run(replace(job, resume=True))
    assert_same(job.out, job.out.with_name("whole"))
    assert not job.directory.exists(), "what a run keeps must go when it has ended"


def test_a_kill_while_a_block_moves_on_changes_no_bit(job: Job, monkeypatch) -> None:
    """The inputs of a block are not touched before it counts as finished."""
    run(replace(job, out=job.out.with_name("whole")))
    write = ActivationFile.__setitem__
    count = 0

    def dies(self: ActivationFile, batch: int, value: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == 22:  # 2 to begin with, 10 a block: the last batch of the second block moves on
            write(self, batch, torch.full_like(value, 9e9))
            raise KeyboardInterrupt
        write(self, batch, value)

    monkeypatch.setattr(ActivationFile, "__setitem__", dies)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    monkeypatch.undo()
    run(replace(job, resume=True))
    assert_same(job.out, job.out.with_name("whole"))


@pytest.mark.slow
def test_a_process_killed_anywhere_resumes_to_the_same_bits(job: Job) -> None:
    import random
    import signal
    import time

    run(replace(job, out=job.out.with_name("whole")))
    command = [sys.executable, "-m", "saltire", "quantize", job.model, str(job.out)]
    command += ["--recipe", "w4a4kv4", "--calibration", job.calibration]
    command += ["--samples", "8", "--length", "64"]
    for seed in range(6):
        resume = ["--resume"] if job.directory.exists() else []
        process = subprocess.Popen([*command, *resume])
        deadline = time.monotonic() + 60
        while not job.directory.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if job.out.exists():
            break
    if not job.out.exists():
        subprocess.run([*command, *(["--resume"] if job.directory.exists() else [])], check=True)
    assert_same(job.out, job.out.with_name("whole"))


def test_streaming_gives_the_bits_of_the_model_in_memory(job: Job) -> None:
    run(job)
    streamed = replace(job, out=job.out.with_name("streamed"), stream=True)
    run(streamed)
    assert_same(job.out, streamed.out)
    loaded = AutoModelForCausalLM.from_pretrained(streamed.out)
    whole = AutoModelForCausalLM.from_pretrained(job.out)
    tokens = random_tokens(whole, 2, 16)
    assert torch.equal(loaded(tokens).logits, whole(tokens).logits)


def test_streaming_keeps_one_block_in_memory(job: Job) -> None:
    seen: list[int] = []

    class Count:
        def before(self, index: int, block: torch.nn.Module, runner: object) -> None:
            assert not any(p.is_meta for p in block.parameters())

        def after(self, index: int, block: torch.nn.Module, runner: object) -> None:
            seen.append(index)

    from saltire.quant import job as module

    emptied: list[object] = []
    original = module.empty_module
    try:
        module.empty_module = lambda m: (emptied.append(m), original(m))  # type: ignore[assignment]
        run(replace(job, stream=True), Count())
    finally:
        module.empty_module = original
    assert seen == [0, 1, 2]
    assert len(emptied) == 3
    assert all(p.is_meta for block in emptied for p in block.state_dict().values())


def test_another_run_is_refused_by_name(job: Job, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job, Kill(1, False))
    with pytest.raises(SaltireError, match="holds a run that did not end"):
        run(job)
    resumed = replace(job, resume=True)
    with pytest.raises(SaltireError, match=r"another recipe: .*act_bits 4 there, 8 here"):
        run(replace(resumed, recipe=RECIPES["w4a8"]))
    with pytest.raises(SaltireError, match="another seed: 0 there, 3 here"):
        run(replace(resumed, seed=3))
    other = tiny_model("llama", seed=1, vocab_size=259, num_hidden_layers=3)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(SaltireError, match=r"another model: .*other"):
        run(replace(resumed, model=str(tmp_path / "other")))
    (job.directory / "block-00000.safetensors").unlink()
    with pytest.raises(SaltireError, match=r"block-00000.* is missing, and later blocks"):
        run(resumed)
    (job.directory / "run.json").write_text("{")
    with pytest.raises(SaltireError, match="no directory of a run"):
        run(resumed)
    assert (job.directory / "states-0-even").exists(), "a refusal must leave the directory alone"
    with pytest.raises(SaltireError, match="nothing to resume"):
        run(replace(resumed, out=tmp_path / "elsewhere"))


def test_what_cannot_stream_is_refused(job: Job) -> None:
    streamed = replace(job, stream=True)
    with pytest.raises(SaltireError, match="cannot write its own calibration text"):
        run(replace(streamed, calibration="self"))
    with pytest.raises(SaltireError, match="dam-80 deals out ranks over the whole model"):
        run(replace(streamed, recipe=RECIPES["dam-80"]))
    with pytest.raises(SaltireError, match="is no directory"):
        run(replace(streamed, model="default"))
    shard = sorted(Path(job.model).glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(SaltireError, match=r"lacks .* tensors that its index names"):
        run(streamed)


def test_a_full_disk_is_an_error_and_what_is_finished_stays(job: Job) -> None:
    """A limit on the size of files stands in for the disk: both fail where space is reserved."""
    with pytest.raises(KeyboardInterrupt):
        run(job, Kill(2, False))
    finished = sorted(job.directory.glob("block-*"))
    before = [path.read_bytes() for path in finished]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
        with pytest.raises(SaltireError, match=r"cannot keep .* MB of activations .*Free some sp"):
            run(replace(job, resume=True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert [path.read_bytes() for path in finished] == before


SPLIT = """
import sys
from pathlib import Path
from saltire import processes
from saltire.quant import RECIPES
from saltire.quant.job import Job, run
processes.start_if_launched()
model, out, text = sys.argv[1:]
run(Job(model, Path(out), RECIPES["w4a4"], text, 8, 64))
"""


@pytest.mark.slow
def test_two_processes_divide_the_samples(job: Job, tmp_path: Path) -> None:
    """The same statistics but for the order of sums: nearly all codes are those of one process."""
    alone = replace(job, recipe=RECIPES["w4a4"], out=tmp_path / "alone")
    run(alone)
    (tmp_path / "split.py").write_text(SPLIT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-port=29517", str(tmp_path / "split.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, job.model, str(job.out), job.calibration], check=True, env=environment
    )
    one, two = tensors(alone.out), tensors(job.out)
    assert one.keys() == two.keys()
    first = "model.layers.0.self_attn.q_proj.weight_packed"
    assert (one[first] == two[first]).float().mean() > 0.99
    half = tmp_path / "half"
    run(replace(alone, samples=4, out=half))
    assert (one[first] == tensors(half)[first]).float().mean() < 0.99, "the samples do not matter"


LEARN = """
import sys
import torch
import torch.distributed as dist
from saltire import processes
from saltire.models.adapters import adapter_for
from saltire.quant import RECIPES, quantize
from saltire.quant.learning.end_to_end import Teacher, tune
from saltire.quant.recipe import Learning
from tests.tiny import random_tokens, tiny_model
from dataclasses import replace
processes.start_if_launched()
torch.manual_seed(0)
model = tiny_model("llama")
tokens = random_tokens(model, 16, 64)
teacher = Teacher.of(model, adapter_for(model.config), tokens[processes.rank() :: 2])
recipe = replace(RECIPES["w2a4"], head_bits=16, learning=Learning(group_steps=10))
quantize(model, None, recipe, tokens)
losses = tune(model, adapter_for(model.config), teacher, epochs=4, rate=5e-3).losses
assert min(losses) < 0.9 * losses[0], losses
state = model.state_dict()
for name in sorted(state):
    if isinstance(state[name], torch.Tensor):
        other = state[name].clone()
        dist.broadcast(other, 1)
        assert torch.equal(other, state[name]), name
both = [None, None]
dist.all_gather_object(both, losses)
assert both[0] == both[1], both
"""


@pytest.mark.slow
def test_two_processes_learn_the_same(tmp_path: Path) -> None:
    (tmp_path / "learn.py").write_text(LEARN)
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-port=29518", str(tmp_path / "learn.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    subprocess.run(command, check=True, env=environment)


def test_samples_that_cannot_be_divided_are_refused(monkeypatch) -> None:
    from saltire import processes

    monkeypatch.setattr(processes, "world_size", lambda: 3)
    model = tiny_model("llama")
    tokens = random_tokens(model, 4, 8)
    monkeypatch.setattr(processes, "from_first", lambda value: value)
    with pytest.raises(SaltireError, match="4 calibration samples cannot be divided among 3"):
        quantize_model(model, None, "w4a4", tokens)


def test_activations_are_read_back(tmp_path: Path) -> None:
    file = ActivationFile(3, (2, 5), tmp_path / "states")
    values = torch.randn(3, 2, 5)
    for index in range(3):
        file[index] = values[index]
    assert torch.equal(file.all(), values)
    file.flush()
    again = ActivationFile(3, (2, 5), tmp_path / "states")
    assert torch.equal(again[1], values[1])
    assert (tmp_path / "states").stat().st_size == values.nbytes
