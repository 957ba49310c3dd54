"""The decoder end to end on the default model: prefill of 512 tokens, then one token at a time.

Peers, where installed: llama.cpp through llama-cpp-python, on the same weights requantised to Q4_0,
Q2_K and BF16. All variants take turns, round after round; the DRAM read rate is of the same run.

Keys: decode_w4_tok_s, prefill_w4_tok_s (W4A8), decode_share_of_dram (bytes of the weights, KV and
scales read per token over the read rate), decode_bf16_tok_s, first_token_ms, memory_mb (weights and
cache), and, with the peer, decode_w4_vs_llamacpp (>= 1.5), prefill_w4_vs_llamacpp (>= 1.5),
decode_w2_vs_llamacpp (>= 1.3), decode_bf16_vs_llamacpp (>= 1.2).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness import Native, Report, Timing, arguments

from saltire.models import load_model
from saltire.models.decoder import build_decoder
from saltire.quant import quantize

PROMPT, NEW = 512, 32


@dataclass
class Engine:
    """Something that takes a prompt and then one token after another."""

    name: str
    prefill: Callable[[list[int]], int]
    step: Callable[[int], int]
    prefills: Timing = field(default_factory=lambda: Timing("prefill"))
    steps: Timing = field(default_factory=lambda: Timing("step"))

    def turn(self, prompt: list[int]) -> None:
        """One prompt and NEW tokens behind it."""
        time.sleep(0.01)
        start = time.perf_counter()
        token = self.prefill(prompt)
        self.prefills.seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(NEW):
            token = self.step(token)
        self.steps.seconds.append((time.perf_counter() - start) / NEW)


def ours(name: str, model) -> tuple[Engine, int]:
    """An engine on our decoder, and the bytes of its weights and cache."""
    decoder = build_decoder(model)
    cache = decoder.new_cache(1, PROMPT + NEW, torch.bfloat16)

    def prefill(prompt: list[int]) -> int:
        cache.roll_back(0, 0)
        return int(decoder.prefill(cache, [prompt]).best[0])

    def step(token: int) -> int:
        return int(decoder.step(cache, [[token]]).best[0])

    return Engine(name, prefill, step), decoder.weight_bytes + cache.bytes


def read_a_token(model) -> int:
    """Bytes of weights that one token reads: all but the embedding, unless the head is tied."""
    decoder = build_decoder(model)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = getattr(head, "weight", None) is embedding
    return decoder.weight_bytes - (0 if tied else embedding.numel() * embedding.element_size())


@contextmanager
def silent_stderr() -> Iterator[None]:
    """llama.cpp writes hundreds of lines about a model it requantises."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def llama_cpp(folder: Path, threads: int) -> list[Engine]:
    """llama.cpp in three formats; none if llama-cpp-python is not installed."""
    try:
        import llama_cpp
    except ImportError:
        return []
    from saltire.models.default import default_model_path

    engines = []
    for name, kind in (
        ("llama.cpp Q4_0", llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0),
        ("llama.cpp Q2_K", llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K),
        ("llama.cpp BF16", llama_cpp.LLAMA_FTYPE_MOSTLY_BF16),
    ):
        path = folder / f"{name.split()[1]}.gguf"
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.allow_requantize, settings.nthread = kind, True, threads
        source = str(default_model_path()).encode()
        with silent_stderr():
            failed = llama_cpp.llama_model_quantize(source, str(path).encode(), settings)
        if failed:
            print(f"{name}: llama.cpp could not requantise the model; left out")
            continue
        model = llama_cpp.Llama(
            str(path),
            n_ctx=PROMPT + NEW + 16,
            n_batch=PROMPT,
            n_ubatch=PROMPT,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=False,
            verbose=False,
        )

        def prefill(prompt: list[int], model=model) -> int:
            model.reset()
            model.eval(prompt)
            return int(model.sample(temp=0.0, repeat_penalty=1.0))

        def step(token: int, model=model) -> int:
            model.eval([token])
            return int(model.sample(temp=0.0, repeat_penalty=1.0))

        engines.append(Engine(name, prefill, step))
    return engines


def main() -> None:
    options = arguments(__doc__)
    report = Report("decode", options.quick)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 40000, (PROMPT,), generator=generator).tolist()
    # Speed does not depend on what the weights are: a little random text calibrates.
    calibration = torch.randint(3, 40000, (4, 64), generator=generator)
    engines, memory, reads = [], {}, {}
    for name in ("W4A8", "W4A4", "W2A4 g64", "BF16"):
        model, tokenizer = load_model()
        if name == "BF16":
            model = model.to(torch.bfloat16)
        else:
            quantize(model, tokenizer, name.lower().replace(" ", "-"), calibration)
        engine, memory[name] = ours(name, model)
        reads[name] = read_a_token(model)
        engines.append(engine)
    native = Native()
    dram = native.dram()
    reading = Timing("dram")
    with tempfile.TemporaryDirectory() as folder:
        engines += llama_cpp(Path(folder), options.threads)
        for _ in range(4 if options.quick else 20):
            for engine in engines:
                engine.turn(prompt)
            start = time.perf_counter()
            dram.run(0)
            reading.seconds.append(time.perf_counter() - start)
    rate = native.dram_bytes / min(reading.seconds)
    by_name = {engine.name: engine for engine in engines}
    for engine in engines:
        pre, one = engine.prefills, engine.steps
        report.row(f"{engine.name} prefill {PROMPT}", pre, tok_s=PROMPT / pre.median)
        extra = {"gb_per_s": reads[engine.name] / one.median / 1e9} if engine.name in reads else {}
        report.row(f"{engine.name} decode", one, tok_s=1 / one.median, **extra)
    w4 = by_name["W4A8"]
    report.key("decode_w4_tok_s", 1 / w4.steps.median)
    report.key("prefill_w4_tok_s", PROMPT / w4.prefills.median)
    report.key("decode_share_of_dram", reads["W4A8"] / w4.steps.median / rate)
    report.key("decode_bf16_tok_s", 1 / by_name["BF16"].steps.median)
    report.key("decode_bf16_share_of_dram", reads["BF16"] / by_name["BF16"].steps.median / rate)
    report.key("first_token_ms", w4.prefills.median * 1e3)
    report.key("memory_mb", memory["W4A8"] / 1e6)
    for key, own, peer in (
        ("w4", "W4A8", "llama.cpp Q4_0"),
        ("w2", "W2A4 g64", "llama.cpp Q2_K"),
        ("bf16", "BF16", "llama.cpp BF16"),
    ):
        if peer in by_name:
            theirs, mine = by_name[peer], by_name[own]
            report.key(f"decode_{key}_vs_llamacpp", theirs.steps.median / mine.steps.median)
            report.key(f"prefill_{key}_vs_llamacpp", theirs.prefills.median / mine.prefills.median)
    report.finish()


if __name__ == "__main__":
    main()
