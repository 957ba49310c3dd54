"""Whole decoders on the device: SmolLM2-135M, and a Llama-3-8B shape with random weights.

Decode at batch 1 under CUDA graphs, W4 against bfloat16 with all else equal: the time of a step's
replay, and tokens a second of whole generations, Python and the token's way to the host included.
Prefill of 512 tokens. CLaSp: its output must be plain decoding's, its plans a small share of the
time. ``--shape`` takes one model; ``--tiny`` runs it all on a toy on the CPU, to see that it works.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from bench.device import report
from bench.device.random_models import LLAMA_3_8B, SMOLLM2_135M, Shape, random_decoder
from saltire.decode import ModelDraft, Session, SkipPlanner
from saltire.decode.session import LONGEST
from saltire.errors import SaltireError
from saltire.nn.decoder import DecoderSizes
from saltire.nn.device_decoder import DeviceDecoder
from saltire.nn.linear_format import LinearFormat

W4A8 = LinearFormat(4, 8, 128, scale_dtype="float16", hadamard=64)
W4A8_G64 = LinearFormat(4, 8, 64, scale_dtype="float16", hadamard=64)
PROMPT, NEW = 512, 128
HERE = Path(__file__).parent
# The default model's file, where its package cannot be installed; or its parts, to be joined.
MODEL = HERE.parents[1] / "build" / "model"
TINY = Shape(DecoderSizes(128, 256, 4, 2, 32, 512, 1024), 3, 1e4, True)


class Device:
    """The device, or the CPU for a rehearsal."""

    def __init__(self, name: str, tokens: int, drafted_tokens: int) -> None:
        self.name, self.tokens, self.drafted_tokens = name, tokens, drafted_tokens

    def synchronise(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        gc.collect()
        if self.name == "cuda":
            torch.cuda.empty_cache()

    def seconds(self, call: Callable[[], object], rounds: int = 5) -> float:
        """Median time of a call, what it starts included."""
        times = []
        for _ in range(rounds + 1):  # the first one records graphs
            self.synchronise()
            start = time.perf_counter()
            call()
            self.synchronise()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])


def random_prompt(decoder: DeviceDecoder, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, decoder.sizes.vocabulary, (length,), generator=generator).tolist()


def step_seconds(device: Device, decoder: DeviceDecoder) -> float:
    """Of one step of one token behind a prompt: replays in a row, nothing awaited in between."""
    cache = decoder.new_cache(1, PROMPT + NEW)
    prompt = random_prompt(decoder, device.tokens)
    decoder.prefill(cache, [prompt])
    steps = 20

    def run() -> None:
        for _ in range(steps):
            decoder.step(cache, [prompt[:1]], commit=False)

    return device.seconds(run) / steps


def generate_rate(device: Device, decoder: DeviceDecoder) -> float:
    """Tokens a second behind a prompt, each one awaited: what a user sees."""
    session, prompt = Session(decoder), random_prompt(decoder, device.tokens)
    rates = []
    for _ in range(4):
        stats = session.generate([prompt], NEW).stats
        rates.append((stats.new_tokens - 1) / (stats.total_seconds - stats.prefill_seconds))
    return statistics.median(rates[1:])


def measure(device: Device, name: str, variant: str, decoder: DeviceDecoder) -> tuple[float, float]:
    """Rows for one decoder; returns seconds of a step and tokens a second of a generation."""
    step = step_seconds(device, decoder)
    rate = generate_rate(device, decoder)
    prompt = random_prompt(decoder, device.tokens)

    def prefill() -> None:
        decoder.prefill(decoder.new_cache(1, PROMPT + NEW), [prompt])

    seconds = device.seconds(prefill)
    share = decoder.read_bytes / step / report.ceiling("copy_bytes_per_s")
    report.row(f"{name} decode", variant, step, weight_bytes=decoder.read_bytes,
               share_of_copy=round(share, 3), generated_per_s=round(rate, 1))  # fmt: skip
    report.row(f"{name} prefill {len(prompt)}", variant, seconds,
               tokens_per_s=round(len(prompt) / seconds))  # fmt: skip
    return step, rate


def clasp(device: Device, name: str, decoder: DeviceDecoder, prompt: list[int]) -> None:
    """Greedy output with drafts of the model's own layers against plain output, both with steps
    padded alike, so that equal means equal. Four drafts a round, whatever they are worth."""
    skipped = max(1, decoder.layers // 4)
    draft = ModelDraft(decoder, decoder.all_units, confidence=0.7)
    planner = SkipPlanner(decoder, skipped)
    session = Session(decoder, {"clasp": draft}, planner, {"clasp": skipped}, fixed=4)
    decoder.verify_rows(LONGEST + 1)
    plain_session = Session(decoder)
    for _ in range(2):  # the first time records graphs
        drafted = session.generate([prompt], device.drafted_tokens)
        plain = plain_session.generate([prompt], device.drafted_tokens)
    stats = drafted.stats
    report.figure(f"{name} clasp lossless", float(drafted.tokens == plain.tokens), at_least=1.0)
    share = stats.plan_seconds / stats.total_seconds
    report.figure(f"{name} clasp plan, share of time", share, at_most=0.05)
    report.figure(f"{name} clasp plans", stats.plans)
    speedup = plain.stats.total_seconds / stats.total_seconds
    report.figure(f"{name} clasp vs plain", speedup, unit="x")
    report.figure(f"{name} clasp acceptance", stats.acceptance)


def compare(device: Device, name: str, variants: dict[str, Callable[[], DeviceDecoder]]) -> None:
    """Each variant against bf16, the first; one after another, so that memory holds one."""
    dense = 0.0
    for variant, make in variants.items():
        decoder = make()
        step, rate = measure(device, name, variant, decoder)
        if not dense:
            dense = step
        else:
            goal = 2.7 if name == "8b" else None
            ratio = dense / step
            report.figure(f"{name} {variant} vs bf16, a step", ratio, at_least=goal, unit="x")
        if name == "smollm2" and dense != step:
            report.figure(f"{name} {variant} decode", rate, at_least=1500, unit="tok/s")
            report.figure(f"{name} {variant} steps", 1 / step, unit="per s")
        prompt = random_prompt(decoder, device.tokens)
        report.attempt(f"{name} {variant} clasp",
                       partial(clasp, device, f"{name} {variant}", decoder, prompt))  # fmt: skip
        del decoder
        device.free()


def eight_b(device: Device, shape: Shape) -> None:
    compare(device, "8b", {
        "bf16": lambda: random_decoder(shape, None, device=device.name),
        "w4a8 g128, bf16 head": lambda: random_decoder(shape, W4A8, device=device.name),
        "w4a8 g128, w4 head": lambda: random_decoder(shape, W4A8, W4A8, device.name),
    })  # fmt: skip


def default_file() -> Path:
    """build/model/NAME.gguf, joined from NAME.gguf.0, NAME.gguf.1 ... if it came in parts."""
    from saltire.models.default import FILE

    whole, parts = MODEL / FILE, sorted(MODEL.glob(f"{FILE}.[0-9]"))
    if not whole.is_file() and parts:
        temporary = whole.with_suffix(".tmp")
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        temporary.replace(whole)
    if not whole.is_file():
        raise SaltireError(f"neither the default model's package nor {whole.name} is here.")
    return whole


def smollm2(device: Device, shape: Shape) -> None:
    """The default model if it can be loaded, else its shape with random weights."""
    if device.name == "cuda" and default_model(device):
        return
    compare(device, "smollm2", {
        "bf16, random": lambda: random_decoder(shape, None, device=device.name),
        "w4a8 g64, random": lambda: random_decoder(shape, W4A8_G64, device=device.name),
    })  # fmt: skip


def default_model(device: Device) -> bool:
    """Measure the default model; False, with the reason printed, if it cannot be loaded."""
    try:
        from saltire.models.decoder import build_device_decoder
        from saltire.models.default import default_model_path
        from saltire.models.loading import load_model
        from saltire.models.rounding import rounded_decoder

        try:
            spec = default_model_path()
        except SaltireError:
            spec = default_file()
        model, _ = load_model(spec)
    except Exception as error:  # transformers, its GGUF reader or the file may be missing
        print(f"random weights stand in for the default model: {str(error).splitlines()[0]}")
        return False
    model.to(device.name)  # type: ignore[arg-type]

    def rounded() -> DeviceDecoder:
        decoder = rounded_decoder(model)
        assert isinstance(decoder, DeviceDecoder)
        return decoder

    compare(device, "smollm2", {
        "bf16": lambda: build_device_decoder(model),
        "w4a8 g32 zeros": rounded,
    })  # fmt: skip
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["smollm2", "8b"], nargs="*", default=["smollm2", "8b"])
    parser.add_argument("--tiny", action="store_true", help="a toy on the CPU, random weights")
    options = parser.parse_args()
    device = Device("cpu", 20, 24) if options.tiny else Device("cuda", PROMPT, 256)
    parts = {
        "smollm2": lambda: smollm2(device, TINY if options.tiny else SMOLLM2_135M),
        "8b": lambda: eight_b(device, TINY if options.tiny else LLAMA_3_8B),
    }
    for name in options.shape:
        report.attempt(name, parts[name])
    report.finish()


if __name__ == "__main__":
    main()
