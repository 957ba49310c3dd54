"""Jobs that are killed, resumed, streamed, divided: the same bits in the end, or a refusal."""

from __future__ import annotations

import os
import resource
import shutil
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
from saltire.quant.recipe import Learning
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
    run(replace(job, resume=True))
    run(replace(job, out=job.out.with_name("whole")))
    assert_same(job.out, job.out.with_name("whole"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_states_that_are_gone_or_cut_off_are_refused(job: Job, damage: str, stream: bool) -> None:
    """What is missing would read as zeros, on which the rest would be calibrated in silence."""
    job = replace(job, stream=stream)
    with pytest.raises(KeyboardInterrupt):
        run(job, Kill(1, True))
    states = job.directory / "states-0-odd"  # what the second block reads
    if damage == "missing":
        states.unlink()
    else:
        os.truncate(states, states.stat().st_size - 4)
    came = "no file" if damage == "missing" else "131068 bytes"
    with pytest.raises(SaltireError, match=rf"states-0-odd: expected 131072 bytes, came {came}"):
        run(replace(job, resume=True))
    assert states.exists() == (damage == "truncated"), "a refusal must leave the directory alone"
    if damage == "truncated":
        assert states.stat().st_size == 131068
    assert not job.out.exists()


def test_the_file_that_takes_the_next_states_may_be_gone(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job, Kill(1, False))
    (job.directory / "states-0-even").unlink()
    run(replace(job, resume=True))
    run(replace(job, out=job.out.with_name("whole")))
    assert_same(job.out, job.out.with_name("whole"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_run_leaves_its_place_free(job: Job, stream: bool) -> None:
    job = replace(job, stream=stream)
    with pytest.raises(SaltireError, match=r"nowhere\.txt"):
        run(replace(job, calibration=str(job.out.with_name("nowhere.txt"))))
    assert not job.directory.exists()
    unfit = replace(job.recipe, group=64)  # the down projection has 96 inputs
    with pytest.raises(SaltireError, match="cannot be cut into group blocks of 64"):
        run(replace(job, recipe=unfit))
    assert not job.directory.exists()
    run(job)


def test_a_refusal_after_a_finished_block_keeps_what_is_finished(job: Job) -> None:
    class Refuse(Kill):
        def before(self, index: int, block: object, runner: object) -> None:
            if index == self.block:
                raise SaltireError("refused")

    with pytest.raises(SaltireError, match="refused"):
        run(job, Refuse(1, False))
    assert (job.directory / "block-00000.safetensors").exists()
    with pytest.raises(SaltireError, match="refused"):
        run(replace(job, resume=True), Refuse(1, False))
    run(replace(job, resume=True))


def test_a_directory_that_was_found_outlives_a_refusal(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job, Kill(0, False))
    with pytest.raises(SaltireError, match="holds a run that did not end"):
        run(job)
    (job.directory / "tokens.safetensors").write_bytes(b"")
    with pytest.raises(SaltireError, match="tokens"):
        run(replace(job, resume=True))
    assert (job.directory / "run.json").exists()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("file", ["block-00000.safetensors", "tokens.safetensors"])
def test_a_file_of_another_run_is_refused(
    job: Job, tmp_path: Path, file: str, stream: bool
) -> None:
    job = replace(job, stream=stream)
    other = tiny_model("llama", seed=1, vocab_size=259, num_hidden_layers=3)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    foreign = replace(job, model=str(tmp_path / "other"), out=tmp_path / "foreign")
    for each in (job, foreign):
        with pytest.raises(KeyboardInterrupt):
            run(each, Kill(1, False))
    shutil.copyfile(foreign.directory / file, job.directory / file)
    with pytest.raises(SaltireError, match=rf"{file} does not belong to this run: expected run"):
        run(replace(job, resume=True))


def test_a_block_in_the_place_of_another_is_refused(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job, Kill(2, False))
    first, second = (job.directory / f"block-0000{k}.safetensors" for k in (0, 1))
    shutil.copyfile(first, second)
    with pytest.raises(SaltireError, match=r"block-00001.*expected part 'block 1', came 'block 0'"):
        run(replace(job, resume=True))


def test_tokens_that_are_gone_are_refused(job: Job) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job, Kill(1, False))
    (job.directory / "tokens.safetensors").unlink()
    with pytest.raises(SaltireError, match=r"tokens.* is missing, and finished blocks"):
        run(replace(job, resume=True))


@pytest.mark.parametrize("content", [b"", b"two", b"\xff"])
def test_a_damaged_count_of_blocks_is_refused(job: Job, content: bytes) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(job, Kill(1, False))
    (job.directory / "finished").write_bytes(content)
    with pytest.raises(SaltireError, match="finished is damaged: expected the number of finished"):
        run(replace(job, resume=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_streamed_and_a_resident_run_are_told_apart_by_name(job: Job, stream: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(replace(job, stream=stream), Kill(1, False))
    said = rf"another setting of --stream: {stream} there, {not stream} here"
    with pytest.raises(SaltireError, match=said):
        run(replace(job, stream=not stream, resume=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "place",
    ["model.embed_tokens", "model.layers.2.mlp.down_proj", "model.norm", "lm_head"],
)
def test_a_model_with_another_last_value_is_another_model(
    tmp_path: Path, place: str, stream: bool
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    jobs = []
    for name in ("one", "other"):
        model = tiny_model("llama", vocab_size=259, num_hidden_layers=3, tie_word_embeddings=False)
        if name == "other":
            with torch.no_grad():
                model.get_submodule(place).weight.view(-1)[-1] += 1
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        text = str(tmp_path / "text.txt")
        folder, recipe = str(tmp_path / name), RECIPES["w4a4kv4"]
        jobs.append(Job(folder, tmp_path / "out", recipe, text, 8, 64, stream=stream))
    with pytest.raises(KeyboardInterrupt):
        run(jobs[0], Kill(1, False))
    with pytest.raises(SaltireError, match=r"another model: .*one.* there, .*other.* here"):
        run(replace(jobs[1], resume=True))


@pytest.mark.parametrize(("block", "late"), [(0, True), (1, False), (2, False)])
def test_a_killed_job_that_learns_resumes_to_the_same_bits(
    job: Job, block: int, late: bool
) -> None:
    learning = Learning(group_steps=5, epochs=1)
    job = replace(job, recipe=replace(job.recipe, learning=learning))
    run(replace(job, out=job.out.with_name("whole")))
    with pytest.raises(KeyboardInterrupt):
        run(job, Kill(block, late))
    run(replace(job, resume=True))
    assert_same(job.out, job.out.with_name("whole"))
    plain = replace(job, recipe=replace(job.recipe, learning=None), out=job.out.with_name("plain"))
    run(plain)
    with pytest.raises(AssertionError):
        assert_same(job.out, plain.out)


def test_a_job_killed_while_it_learns_end_to_end_resumes_to_the_same_bits(
    job: Job, monkeypatch
) -> None:
    job = replace(job, recipe=replace(job.recipe, learning=Learning(group_steps=5, epochs=1)))
    run(replace(job, out=job.out.with_name("whole")))

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("saltire.quant.learning.stages.tune", dies)
    with pytest.raises(KeyboardInterrupt):
        run(job)
    monkeypatch.undo()
    run(replace(job, resume=True))
    assert_same(job.out, job.out.with_name("whole"))


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
from saltire.quant.learning import end_to_end
from saltire.quant.learning.end_to_end import Teacher, tune
from saltire.quant.recipe import Learning
from tests.tiny import random_tokens, tiny_model
from dataclasses import replace
processes.start_if_launched()
torch.manual_seed(0)
model = tiny_model("llama")
tokens = random_tokens(model, 16, 64)
end_to_end.VOCABULARY = 80  # fewer than the model has, so that candidates are to be agreed on
teacher = Teacher.of(model, adapter_for(model.config), tokens[processes.rank() :: 2])
recipe = replace(RECIPES["w2a4"], head_bits=16, learning=Learning(group_steps=10))
quantize(model, None, recipe, tokens)
losses = tune(model, adapter_for(model.config), teacher, epochs=4, rate=5e-3).losses
assert min(losses) < 0.9 * losses[0], losses
state = {**model.state_dict(), "candidates": teacher.head}
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
