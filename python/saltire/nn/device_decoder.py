"""A decoder on a CUDA device: its parts as kernels, its steps as graphs that are replayed.

Steps of up to ``MOST_RECORDED`` rows run on memory of their own for each number of rows: a whole
step is one graph; a step that skips layers is a graph for each layer that it keeps, so that a new
choice of layers records nothing anew. What changes from step to step is in ``rows``, which the
kernels read. Longer steps, and prompts, launch kernel by kernel.

Everything here is the same on the CPU, where specification stands in for kernels and calls for
graphs: that is how it is tested where there is no device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.nn.decoder import Decoder, DecoderSizes, LayerWeights, StepResult
from saltire.nn.device_layer import DeviceLayer
from saltire.nn.device_memory import DeviceMemory, Pass, Recorded
from saltire.nn.device_products import Dense, Product
from saltire.nn.device_rows import check_rows
from saltire.nn.drafting import draft_by_steps
from saltire.nn.kv_cache import KVCache
from saltire.nn.quant_embedding import QuantEmbedding
from saltire.nn.recording import GraphRecorder, Recorder, keep_calling
from saltire.ops import layer_parts
from saltire.ops.decoder_layer import ATTENTION, MLP

RECORDED_ROWS = (1, 2, 4, 8, 16, 32, 64)  # a step is padded to the next of these
MOST_RECORDED = RECORDED_ROWS[-1]


class DeviceDecoder(Decoder):
    """A decoder on a device, with copies of the weights in the layouts of its kernels.

    Between kernels stand numbers of ``dtype``; the residual stream, the norms and attention are
    float32. Dense weights are cast to ``dtype``.
    """

    prefill_rows = 1024
    ahead = 8

    def __init__(
        self,
        sizes: DecoderSizes,
        eps: float,
        embedding: Tensor | QuantEmbedding,
        head: nn.Module,
        final_norm: Tensor,
        layers: Iterable[LayerWeights],
        rotation: Callable[[Tensor], tuple[Tensor, Tensor]],
        cache_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """layers: taken one after another, so that they need not all exist at once. rotation:
        positions [T] -> cosines and sines, f32 [T, head_dim / 2] each."""
        if isinstance(embedding, QuantEmbedding):
            embedding = embedding.dequantized().to(dtype)
        self.device, self.dtype, self.eps = embedding.device, dtype, eps
        tied = isinstance(head, nn.Linear) and head.weight.data_ptr() == embedding.data_ptr()
        # Logits of codes come in float32 at no cost; dense weights need their input in their dtype.
        head_dtype = dtype if isinstance(head, nn.Linear) else torch.float32
        self._head = Product({"lm_head": head}, head_dtype, self.device)
        part = self._head.parts[0]
        self._embedding = part.weight if tied and isinstance(part, Dense) else embedding.detach()
        self._final_norm = final_norm.detach().to(self.device, torch.float32)
        self._layers = [
            DeviceLayer(index, layer, sizes.heads, eps, dtype, self.device)
            for index, layer in enumerate(layers)
        ]
        self._describe(sizes, len(self._layers), cache_dtype)
        self._all = self.all_units.tolist()
        self.memory = DeviceMemory(sizes, len(self._layers), rotation, self.device)
        on_cuda = self.device.type == "cuda"
        self.record: Recorder = GraphRecorder(self.device) if on_cuda else keep_calling
        self._least_rows = 1
        self.read_bytes = sum(layer.bytes for layer in self._layers) + self._head.bytes
        embedding_bytes = self._embedding.numel() * self._embedding.element_size()
        self.weight_bytes = self.read_bytes + (0 if tied else embedding_bytes)

    def verify_rows(self, rows: int) -> None:
        """Pad steps of fewer rows to so many, at most 64: the product kernels then are the same,
        and with them a row's bits. Costs what the products of so many rows take more than those of
        one."""
        self._least_rows = min(rows, MOST_RECORDED)

    def new_cache(self, sequences: int, slots: int, dtype: torch.dtype | None = None) -> KVCache:
        """``Decoder.new_cache``, with some more slots, and where an earlier cache lay if that is
        free."""
        dtype = dtype or self.cache_dtype
        if slots <= self.sizes.positions:
            slots = self.memory.slots_for(slots)
            vacant = self.memory.vacant(sequences, slots, dtype)
            if vacant is not None:
                return vacant
        return super().new_cache(sequences, slots, dtype)

    # --- steps -----------------------------------------------------------------------------------

    def _units(self, run: Pass, units: Sequence[int], first: int = 0) -> Tensor | None:
        """Run what is kept of the layers from ``first`` on; returns what the last unit has yet to
        add to the state. A unit adds what the one before left, on its way to its norm."""
        delta: Tensor | None = None
        for index, kept in enumerate(units, start=first):
            for unit, work in (
                (ATTENTION, self._layers[index].attention),
                (MLP, self._layers[index].mlp),
            ):
                if kept & unit:
                    place = 2 * index + (unit == MLP)
                    delta = work(run, delta, None if run.trace is None else run.trace[place])
        return delta

    def _logits(self, run: Pass, delta: Tensor | None) -> Tensor:
        trace = None if run.trace is None else run.trace[-1]
        return self._head.of_norm(run.state, delta, self._final_norm, self.eps, trace)

    @torch.no_grad()
    def step_rows(
        self,
        cache: KVCache,
        rows: Sequence[Sequence[int]] | Tensor,
        wanted: Sequence[int] | Tensor,
        units: Tensor | None = None,
        trace: Tensor | None = None,
        hidden: Tensor | None = None,
        prefill: bool = False,
    ) -> StepResult:
        table = rows.tolist() if isinstance(rows, Tensor) else [list(row) for row in rows]
        asked = wanted.tolist() if isinstance(wanted, Tensor) else list(wanted)
        self._check_cache(cache)
        check_rows(cache, self.sizes, table, asked, reads_tokens=hidden is None)
        kept = self._all if units is None else units.tolist()
        if not table:
            return self._nothing()
        whole = hidden is None and kept == self._all
        if prefill or len(table) > MOST_RECORDED or (trace is not None and not whole):
            return self._long_step(cache, table, asked, kept, trace, hidden, prefill)
        recorded = self._recorded_for(cache, table)
        if whole and asked:
            recorded.replay(("whole",), self.record, partial(self._whole, recorded))
        else:
            self._replay_pieces(recorded, len(table), kept, hidden, bool(asked))
        if trace is not None and recorded.run.trace is not None:
            trace.copy_(recorded.run.trace[:, asked])
        return self._results(recorded, asked, len(table))

    def _recorded_for(self, cache: KVCache, table: list[list[int]]) -> Recorded:
        least = max(len(table), self._least_rows)
        recorded = self.memory.recorded(cache, next(n for n in RECORDED_ROWS if n >= least))
        recorded.set_rows(table)
        return recorded

    def _replay_pieces(
        self, recorded: Recorded, M: int, kept: list[int], hidden: Tensor | None, head: bool
    ) -> None:
        run = recorded.run
        if hidden is None:
            recorded.replay(("embed",), self.record, partial(self._embed, run))
        else:
            run.state[:M].copy_(hidden)
        for index, units in enumerate(kept):
            if units:
                piece = partial(self._piece, run, index, units)
                recorded.replay((index, units), self.record, piece)
        if head:
            recorded.replay(("head",), self.record, partial(self._finish, recorded, None))
        if hidden is not None:
            hidden.copy_(run.state[:M])

    def _results(self, recorded: Recorded, asked: list[int], M: int) -> StepResult:
        """Copies: the next replay writes over what this one left."""
        if not asked:
            return self._nothing()
        if asked == list(range(M)):
            return StepResult(
                recorded.logits[:M].clone(), recorded.best[:M].clone(), recorded.share[:M].clone()
            )
        return StepResult(recorded.logits[asked], recorded.best[asked], recorded.share[asked])

    def _nothing(self) -> StepResult:
        none = torch.empty(0, device=self.device)
        return StepResult(none.view(0, self.sizes.vocabulary), none.long(), none)

    def _embed(self, run: Pass) -> None:
        layer_parts.embed_rows(run.rows, self._embedding, run.state)

    def _piece(self, run: Pass, index: int, units: int) -> None:
        """One layer's kept units, by themselves: what they leave is in the state."""
        untraced = replace(run, trace=None)
        _settle(untraced, self._units(untraced, [units], first=index))

    def _whole(self, recorded: Recorded) -> None:
        run = recorded.run
        self._embed(run)
        self._finish(recorded, self._units(run, self._all))

    def _finish(self, recorded: Recorded, delta: Tensor | None) -> None:
        run = recorded.run
        y = self._logits(run, delta)
        best, share = layer_parts.best_logits(y, recorded.logits, run.scratch)
        recorded.best.copy_(best)
        recorded.share.copy_(share)

    def _long_step(
        self,
        cache: KVCache,
        table: list[list[int]],
        asked: list[int],
        kept: list[int],
        trace: Tensor | None,
        hidden: Tensor | None,
        prefill: bool,
    ) -> StepResult:
        M, D = len(table), self.sizes.hidden
        state = hidden if hidden is not None else torch.empty(M, D, device=self.device)
        prompt = prefill and all(row[1] == table[0][1] and row[3] >= 0 for row in table)
        rows = torch.tensor(table, device=self.device)
        run = self.memory.on(cache, rows, state, prompt)
        if hidden is None:
            self._embed(run)
        if trace is None:
            _settle(run, self._units(run, kept))
        else:  # of few rows of many, so unit by unit
            trace[0].copy_(run.state[asked])
            for layer, units in enumerate(kept):
                for unit in (ATTENTION, MLP):
                    _settle(run, self._units(run, [units & unit], first=layer))
                    trace[2 * layer + 1 + (unit == MLP)].copy_(run.state[asked])
        if not asked:
            return self._nothing()
        y = self._logits(replace(run, state=run.state[asked]), None)
        logits = torch.empty(y.shape, device=self.device)
        return StepResult(logits, *layer_parts.best_logits(y, logits, run.scratch))

    # --- several steps ---------------------------------------------------------------------------

    @torch.no_grad()
    def run_ahead(
        self, cache: KVCache, starts: Sequence[Sequence[int]], count: int
    ) -> list[list[int]]:
        rows = [[token, sequence, slot, slot, slot + 1, 0] for token, sequence, slot in starts]
        M = len(rows)
        self._check_cache(cache)
        for ahead in (0, count - 1):  # the first step and the last
            later = [[t, s, p + ahead, o + ahead, x + ahead, 0] for t, s, p, o, x, _ in rows]
            check_rows(cache, self.sizes, later, range(M), reads_tokens=True)
        recorded = self._recorded_for(cache, rows)
        tokens = torch.empty(count, M, dtype=torch.int64, device=self.device)
        for step in range(count):
            recorded.replay(("whole",), self.record, partial(self._whole, recorded))
            tokens[step].copy_(recorded.best[:M])
            recorded.replay(("advance", M), self.record, partial(_advance, recorded, M))
        return tokens.T.tolist()

    def draft(
        self,
        cache: KVCache,
        starts: Sequence[Sequence[int]],
        survival: Tensor,
        units: Tensor | None = None,
        confidence: float = 0.0,
        worth: float = 0.0,
        head_outputs: int = 0,
    ) -> tuple[list[list[int]], list[list[float]]]:
        least, self._least_rows = self._least_rows, 1  # drafts may differ from the target
        try:
            return draft_by_steps(
                self, cache, starts, survival, units, confidence, worth, head_outputs
            )
        finally:
            self._least_rows = least

    def _check_cache(self, cache: KVCache) -> None:
        layers, kv_heads, device = cache.kv.shape[0], cache.kv.shape[3], cache.kv.device
        if (layers, kv_heads, device) != (self.layers, self.sizes.kv_heads, self.device):
            raise SaltireError(
                f"the cache has {layers} layers of {kv_heads} heads on {device}; this model "
                f"{self.layers} of {self.sizes.kv_heads} on {self.device}. It belongs to another "
                "model; make a new one."
            )


def _advance(recorded: Recorded, M: int) -> None:
    """The next step's rows: the best tokens, one place on."""
    rows = recorded.run.rows[:M]
    rows[:, :1].copy_(recorded.best[:M, None])
    rows[:, 2:5].add_(1)  # position, slot, prefix


def _settle(run: Pass, delta: Tensor | None) -> None:
    """Add what a unit left to the state."""
    if delta is not None:
        run.state.add_(delta)
