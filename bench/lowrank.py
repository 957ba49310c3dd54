"""DAM on the default model: low rank and quantisation together, at equal bytes.

Every method compresses the linears of the blocks under one budget of bytes, a share of what they
take at W4 per channel; the head, the embedding and the norms stay as they are. Methods of a table
have the same ranks. W4A4 in the factors, W8A8 where the share is above 1; W2A8 for Q + LR, against
W2A8 in finer groups.

Keys of the last line, at the share named (0.8 where none is): dam_vs_naive_gap (<= 0.6), the
perplexity that quantising costs over the unquantised low-rank model, DAM with its rotation over the
plain SVD with Σ in the first factor; dam_vs_balanced_gap, the same over SVD-LLM's split of Σ in two
halves; order_gap (> 1), perplexity of quantising first over that of truncating first, both naive;
qlr_dam_vs_qlr_gap (<= 0.9) and w2_qlr_vs_w2_gap (<= 0.8), gaps to fp32 at equal bytes;
factored_vs_dense_time (<= 0.65), the larger of _m1 and _m512, K = N = 4096, rank K/4;
learned_seconds (<= 900), the whole model with a learned diagonal; learned_spread, over 5 seeds, of
the held-out loss relative to its mean, the largest of three layers. --quick: one budget, half the
tokens; the same method.
--parts: some of the tables only; --shares: some of the budgets of the factored one. A row goes to
the CSV as soon as it is measured.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from harness import HERE, Variant, commit, copies_past_l3, device, interleave
from torch import Tensor, nn

from saltire.models.adapters import adapter_for, share_inputs
from saltire.models.loading import load_model
from saltire.nn.factored_linear import FactoredQuantLinear
from saltire.nn.linear_format import FactoredFormat, LinearFormat
from saltire.nn.quant_linear import QuantLinear
from saltire.quant.blocks import BlockRunner
from saltire.quant.evaluate import perplexity
from saltire.quant.layer import finite_linear, quantize_group
from saltire.quant.lowrank.budget import LayerSpectrum, allocate, branch_ranks, spectra
from saltire.quant.lowrank.factored import factor_group
from saltire.quant.lowrank.learning import learn_diagonal
from saltire.quant.lowrank.residual import residual_group
from saltire.quant.lowrank.truncation import Statistics, truncate
from saltire.quant.recipe import LowRank, Recipe
from saltire.quant.recipes import RECIPES
from saltire.quant.texts import calibration_tokens, evaluation_tokens

Ranks = Mapping[str, "int | None"]
PARTS = ("timing", "seeds", "factored", "residual")


class Bench:
    """The texts, and one row for every model that was made of the default one."""

    def __init__(self, folder: Path | None, stamp: Mapping[str, object]) -> None:
        quick = bool(stamp["quick"])
        samples, windows = (4, 6) if quick else (8, 12)
        calibration, test = (
            (str(folder / "valid.txt"), str(folder / "test.txt")) if folder else ("self", "pydoc")
        )
        self.stamp, self.seconds = stamp, 0.0  # of making the last model
        model, tokenizer = load_model()
        self.tokens = calibration_tokens(
            calibration, model, tokenizer, samples=samples, length=1024
        )
        self.test = evaluation_tokens(test, tokenizer, windows=windows, length=1024)
        self.adapter = adapter_for(model.config)

    @cached_property
    def fp32(self) -> float:
        return perplexity(load_model()[0], self.test).value

    @cached_property
    def layers(self) -> dict[str, LayerSpectrum]:
        return spectra(load_model()[0], self.adapter, self.tokens, 2)

    @property
    def w4(self) -> int:
        return sum(layer.w4_bytes() for layer in self.layers.values())

    @torch.no_grad()
    def measure(self, name: str, share: float, recipe: Recipe | None, ranks: Ranks) -> float:
        """Perplexity of the model that a recipe makes with these ranks; None: only truncated."""
        start = time.perf_counter()
        model, _ = load_model()
        runner = BlockRunner(model, self.adapter, self.tokens, 2)
        for index, block in enumerate(self.adapter.blocks(model)):
            for names in self.adapter.groups:
                x = runner.inputs_of(block, names[0])
                path = f"{self.adapter.blocks_path}.{index}"
                chosen = {n: ranks.get(f"{path}.{n}") for n in names}
                if recipe is None:
                    truncate_group(block, names, x, chosen)
                elif recipe.low_rank is None:
                    quantize_group(block, names, x, recipe)
                elif recipe.low_rank.kind == "factored":
                    factor_group(block, names, x, recipe, chosen)
                else:
                    residual_group(block, names, x, recipe, {n: r or 0 for n, r in chosen.items()})
            runner.advance(block)
        share_inputs(model)
        self.seconds = time.perf_counter() - start
        value = perplexity(model, self.test).value
        stored = sum(
            tensor.nbytes
            for block in self.adapter.blocks(model)
            for module in block.modules()
            if isinstance(module, QuantLinear)
            for tensor in module.state_dict().values()
        )
        save(
            self.stamp,
            case=f"share {share:g}",
            variant=name,
            perplexity=round(value, 3),
            fp32=round(self.fp32, 3),
            bytes_over_w4=round(stored / self.w4, 4),
            seconds=round(self.seconds, 1),
        )
        return value


def truncate_group(
    block: nn.Module, names: tuple[str, ...], x: Tensor, ranks: Mapping[str, int | None]
) -> None:
    """The low-rank model before anything is quantised."""
    for name in names:
        linear, rank = finite_linear(block, name), ranks[name]
        if rank is not None:
            low = truncate(linear.weight.detach(), Statistics.of(x), rank)
            linear.weight.data = low.weight().float()


def factors_at(share: float) -> Recipe:
    """How both factors are quantised under a share of W4's bytes."""
    return replace(RECIPES["w8a8" if share > 1 else "w4a4"], head_bits=16)


def factored_table(bench: Bench, share: float, quick: bool) -> dict[str, float]:
    """L -> Q in every split, Q -> L, at one budget."""
    base = factors_at(share)
    ranks = allocate(bench.layers, share, base.weight_bits)
    whole = sum(rank is None for rank in ranks.values())
    print(f"share {share}: {whole} of {len(ranks)} linears are kept whole")

    def run(name: str, gauge: str, first: bool = False) -> float:
        low_rank = LowRank("factored", share, gauge, quantise_first=first)  # type: ignore[arg-type]
        return bench.measure(name, share, replace(base, low_rank=low_rank), ranks)

    low = bench.measure("low rank, not quantised", share, None, ranks)
    naive = run("L->Q naive, U|ΣV turned: Σ in the first factor", "down")
    first = run("Q->L naive", "down", first=True)
    dam = run("L->Q DAM, rotation", "hadamard")
    balanced = run("L->Q Σ in halves", "balanced")
    learned = run("L->Q DAM, learned, rotation", "learned-hadamard")
    seconds = bench.seconds
    if not quick:
        run("L->Q Σ in the second factor", "up")
        run("L->Q DAM, closed form", "closed")
        run("L->Q DAM, learned", "learned")
    suffix = "" if share == 0.8 else f"_{share:g}"
    return {
        f"dam_vs_naive_gap{suffix}": (dam - low) / (naive - low),
        f"dam_vs_balanced_gap{suffix}": (dam - low) / (balanced - low),
        f"learned_vs_naive_gap{suffix}": (learned - low) / (naive - low),
        f"order_gap{suffix}": first / naive,
        f"learned_seconds{suffix}": seconds,
    }


def residual_table(bench: Bench, share: float, quick: bool) -> dict[str, float]:
    """W2A8 with a branch, its factors plain or through DAM, against W2A8 in groups of 64."""
    grouped = replace(RECIPES["w2a8-g64"], head_bits=16)
    scales = {n: layer.N * (layer.K // 64) * 2 for n, layer in bench.layers.items()}
    codes = sum(layer.N * layer.K // 4 for layer in bench.layers.values())
    equal = (codes + sum(scales.values())) / bench.w4
    plain = bench.measure("W2A8 in groups of 64", equal, grouped, {})
    values = {}
    for at in (equal, share):
        ranks = branch_ranks(bench.layers, at, 2, 4, 0)
        for gauge in ("down", "hadamard"):
            low_rank = LowRank("residual", at, gauge)  # type: ignore[arg-type]
            recipe = replace(RECIPES["w2a8"], head_bits=16, low_rank=low_rank)
            values[at, gauge] = bench.measure(f"W2A8 + LR, {gauge}", at, recipe, ranks)
        if quick:
            break
    gap = values[equal, "hadamard"] - bench.fp32
    return {
        "qlr_dam_vs_qlr_gap": gap / (values[equal, "down"] - bench.fp32),
        "w2_qlr_vs_w2_gap": gap / (plain - bench.fp32),
    }


@torch.no_grad()
def timing(seconds: float, stamp: Mapping[str, object]) -> dict[str, float]:
    """Our factored W4A4 linear against our dense one, each on weights that come from memory."""
    K = N = 4096
    outer = LinearFormat(4, 4, diag=True, hadamard=64)
    factored = FactoredFormat(K // 4, outer, LinearFormat(4, 4))

    def fill(layer: QuantLinear) -> None:
        layer.weight_packed = torch.randint_like(layer.weight_packed, 0, 256)
        layer.weight_scale.uniform_(0.01, 0.02)
        if layer.diag is not None:
            layer.diag.uniform_(0.5, 1.5)

    copies = copies_past_l3(N * K // 4)
    dense = [QuantLinear(K, N, outer) for _ in range(copies)]
    thin = [FactoredQuantLinear(K, N, factored) for _ in range(copies)]
    for layer in [*dense, *(part for pair in thin for part in (pair.down, pair.up))]:
        fill(layer)
    keys = {}
    for M in (1, 512):
        x = torch.randn(M, K)
        variants = [
            Variant("dense", lambda turn, x=x: dense[turn % copies](x)),
            Variant("factored", lambda turn, x=x: thin[turn % copies](x)),
        ]
        rounds = interleave(variants, seconds, calls=8 if M == 1 else 1)
        for name in ("dense", "factored"):
            milliseconds = round(rounds[name].median * 1e3, 4)
            save(stamp, case=f"M={M} N=K={K} R={K // 4}", variant=name, median_ms=milliseconds)
        keys[f"factored_vs_dense_time_m{M}"] = rounds.ratio("factored", "dense")
    keys["factored_vs_dense_time"] = max(keys.values())
    return keys


@torch.no_grad()
def seeds(bench: Bench) -> dict[str, float]:
    """Five seeds of the learned diagonal on three layers: what it gains, how far they differ."""
    model, _ = load_model()
    runner = BlockRunner(model, bench.adapter, bench.tokens, 2)
    blocks = bench.adapter.blocks(model)
    spreads, gains = [], []
    recipe = replace(RECIPES["w4a4"], low_rank=LowRank("factored", 0.8, "learned-hadamard"))
    for index, block in enumerate(blocks):
        if index == 3:
            for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
                x = runner.inputs_of(block, name)
                statistics_ = Statistics.of(x)
                low = truncate(finite_linear(block, name).weight.detach(), statistics_, 192)
                runs = [learn_diagonal(x, low, statistics_, recipe, seed) for seed in range(5)]
                losses = [run.best for run in runs]
                spreads.append(statistics.stdev(losses) / statistics.mean(losses))
                gains.append(statistics.mean(run.best / run.losses[0] for run in runs))
                print(f"{name}: losses {losses}, from {[run.losses[0] for run in runs]}")
            break
        runner.advance(block)
    return {"learned_spread": max(spreads), "learned_loss_over_closed": statistics.mean(gains)}


def save(stamp: Mapping[str, object], **row: object) -> None:
    """Print a row and append it to the CSV."""
    print(row, flush=True)
    path = HERE / "results" / "lowrank.csv"
    path.parent.mkdir(exist_ok=True)
    old = list(csv.DictReader(path.open())) if path.exists() else []
    rows = [*old, {**stamp, **row}]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for each in rows for key in each)))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one budget, half the tokens")
    parser.add_argument("--data", default=os.environ.get("SALTIRE_DATA"), help="folder of data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of the tables only")
    parser.add_argument("--shares", help="of W4's bytes, of the factored table: 0.6,0.4,1.6")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts {options.parts}; expected some of {','.join(PARTS)}")
    chosen = options.shares or ("0.8" if options.quick else "0.8,0.6,0.4,1.6")
    try:
        shares = [float(share) for share in chosen.split(",")]
    except ValueError:
        parser.error(f"--shares {chosen}; expected numbers like 0.6,0.4")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    stamp: dict[str, object] = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device(),
        "quick": options.quick,
        "text": "wikitext-2" if options.data else "embedded",
    }
    start = time.perf_counter()
    keys: dict[str, float] = {}
    if "timing" in parts:
        keys |= timing(4.0 if options.quick else 10.0, stamp)
    if parts != ["timing"]:
        bench = Bench(Path(options.data) / "wikitext-2" if options.data else None, stamp)
        if "residual" in parts:
            keys |= residual_table(bench, 0.8, options.quick)
        if "factored" in parts:
            for base in dict.fromkeys(factors_at(share) for share in shares):
                bench.measure(f"{base.name}, whole", base.weight_bits / 4, base, {})
            for share in shares:
                keys |= factored_table(bench, share, options.quick)
        if "seeds" in parts:
            keys |= seeds(bench)
        if parts != ["seeds"]:
            keys["ppl_fp32"] = bench.fp32
    rounded = {name: round(value, 3) for name, value in keys.items()}
    print(json.dumps({**rounded, **stamp, "seconds": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
