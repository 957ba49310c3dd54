"""A decoder on a CUDA device: its parts as kernels, its steps as graphs that are replayed.

Steps of up to ``MOST_RECORDED`` rows run on memory of their own for each number of rows: a whole
step is one graph; a step that skips layers is a graph for each layer that it keeps, so that a new
choice of layers records nothing anew. What changes from step to step is in ``rows``, which the
kernels read. Longer steps, and prompts, launch kernel by kernel.

Everything here is the same on the CPU, where specification stands in for kernels and calls for
graphs: that is how it is tested where there is no device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from saltire.errors import SaltireError
from saltire.nn.decoder import Decoder, DecoderSizes, LayerWeights, StepResult
from saltire.nn.device_products import Dense, Product
from saltire.nn.kv_cache import KVCache
from saltire.nn.quant_embedding import QuantEmbedding
from saltire.nn.recording import GraphRecorder, Recorder, Replay, keep_calling
from saltire.ops import layer_parts
from saltire.ops.decoder_layer import ATTENTION, CONFIDENCE_BINS, MLP, PRIVATE, ROW_COLUMNS

RECORDED_ROWS = (1, 2, 4, 8, 16, 32, 64)  # a step is padded to the next of these
MOST_RECORDED = RECORDED_ROWS[-1]
CACHES = 4  # whose graphs are kept
IDLE_ROW = [0, 0, 0, PRIVATE, 0, 0]  # sees itself only, writes nothing: fills a step up


class _Layer:
    """One block's weights, on the device."""

    def __init__(self, layer: LayerWeights, dtype: torch.dtype, device: torch.device) -> None:
        def norm(gain: Tensor | None) -> Tensor | None:
            return None if gain is None else gain.detach().to(device, torch.float32)

        names = list(layer.linears)
        q, k, v, o, gate, up, down = names

        def product(*some: str) -> Product:
            return Product({name: layer.linears[name] for name in some}, dtype, device)

        self.qkv, self.o = product(q, k, v), product(o)
        self.gate_up, self.down = product(gate, up), product(down)
        self.input_norm, self.post_norm = norm(layer.input_norm), norm(layer.post_norm)
        self.q_norm, self.k_norm = norm(layer.q_norm), norm(layer.k_norm)
        self.window = layer.window

    @property
    def bytes(self) -> int:
        return sum(p.bytes for p in (self.qkv, self.o, self.gate_up, self.down))


@dataclass
class _Pass:
    """What a step runs on. trace: f32 [2L + 1, M, D] or None, the states between all units."""

    rows: Tensor
    state: Tensor
    kv: Tensor
    scales: Tensor | None
    rotation: Tensor
    scratch: Tensor
    prompt: bool = False
    trace: Tensor | None = None


class _Recorded:
    """The memory and the graphs of steps of M rows on one cache."""

    def __init__(self, decoder: DeviceDecoder, cache: KVCache, M: int) -> None:
        sizes, device, f32 = decoder.sizes, decoder.device, torch.float32
        L, D = decoder.layers, sizes.hidden
        self.run = _Pass(
            rows=torch.tensor([IDLE_ROW] * M, device=device),
            state=torch.zeros(M, D, device=device),
            kv=cache.kv,
            scales=cache.scales,
            rotation=decoder.rotation_for(cache.slots),
            scratch=decoder.scratch_for(M),
            trace=torch.zeros(2 * L + 1, M, D, device=device),
        )
        self.logits = torch.zeros(M, sizes.vocabulary, device=device)
        self.best = torch.zeros(M, dtype=torch.int64, device=device)
        self.share = torch.zeros(M, dtype=f32, device=device)
        self._pieces: dict[tuple[object, ...], Replay] = {}

    def replay(self, name: tuple[object, ...], record: Recorder, work: Callable[[], None]) -> None:
        """Do a piece of work, recorded the first time."""
        if name not in self._pieces:
            self._pieces[name] = record(work, [self.run.state])
        self._pieces[name]()


class DeviceDecoder(Decoder):
    """A decoder on a device, with copies of the weights in the layouts of its kernels.

    Between kernels stand numbers of ``dtype``; the residual stream, the norms and attention are
    float32. Dense weights are cast to ``dtype``.
    """

    prefill_rows = 1024

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
        self._layers = [_Layer(layer, dtype, self.device) for layer in layers]
        self._describe(sizes, len(self._layers), cache_dtype)
        self._rotation_of = rotation
        self._rotation = torch.empty(0, 2, sizes.head_dim // 2)
        self._scratch = torch.zeros(0, dtype=torch.int32, device=self.device)
        self._recorded: OrderedDict[tuple[object, ...], dict[int, _Recorded]] = OrderedDict()
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

    # --- memory ----------------------------------------------------------------------------------

    def rotation_for(self, positions: int) -> Tensor:
        if positions > self._rotation.shape[0]:
            places = torch.arange(positions, device=self.device)
            cosines, sines = self._rotation_of(places)
            self._rotation = torch.stack([cosines, sines], dim=1).float().contiguous()
            self._recorded.clear()  # they read the old table
        return self._rotation

    def scratch_for(self, rows: int) -> Tensor:
        sizes = self.sizes
        count = max(rows, layer_parts.attention_counters(rows, sizes.heads, sizes.kv_heads))
        if count > self._scratch.numel():
            self._scratch = torch.zeros(count, dtype=torch.int32, device=self.device)
        return self._scratch

    def _recorded_for(self, cache: KVCache, M: int) -> _Recorded:
        """Found again for a new cache that lies where an old one lay."""
        rotation = self.rotation_for(cache.slots)
        grids = 0 if cache.scales is None else cache.scales.data_ptr()
        key = (cache.kv.data_ptr(), grids, tuple(cache.kv.shape), cache.dtype, rotation.data_ptr())
        sizes = self._recorded.setdefault(key, {})
        self._recorded.move_to_end(key)
        while len(self._recorded) > CACHES:
            self._recorded.popitem(last=False)
        if M not in sizes:
            sizes[M] = _Recorded(self, cache, M)
        return sizes[M]

    # --- units -----------------------------------------------------------------------------------

    def _attention(
        self, index: int, run: _Pass, delta: Tensor | None, trace: Tensor | None
    ) -> Tensor:
        layer = self._layers[index]
        assert layer.input_norm is not None
        qkv = layer.qkv.of_norm(run.state, delta, layer.input_norm, self.eps, trace)
        cache = (run.kv, run.scales, index)
        queries, own = layer_parts.append_heads(
            qkv, run.rows, run.rotation, layer.q_norm, layer.k_norm, self.eps, self.sizes.heads,
            *cache,
        )  # fmt: skip
        seen = layer_parts.attend_heads(
            queries, own, run.rows, *cache, layer.window, run.prompt, self.dtype, run.scratch
        )
        return layer.o(seen)

    def _mlp(self, index: int, run: _Pass, delta: Tensor | None, trace: Tensor | None) -> Tensor:
        layer = self._layers[index]
        assert layer.post_norm is not None
        gate_up = layer.gate_up.of_norm(run.state, delta, layer.post_norm, self.eps, trace)
        return layer.down.of_gate(gate_up)

    def _units(self, run: _Pass, units: Sequence[int], first: int = 0) -> Tensor | None:
        """Run what is kept of the layers from ``first`` on; returns what the last unit has yet to
        add to the state. A unit adds what the one before left, on its way to its norm."""
        delta: Tensor | None = None
        for index, kept in enumerate(units, start=first):
            for unit, work in ((ATTENTION, self._attention), (MLP, self._mlp)):
                place = 2 * index + (unit == MLP)
                trace = None if run.trace is None else run.trace[place]
                if kept & unit:
                    delta = work(index, run, delta, trace)
        return delta

    def _logits(self, run: _Pass, delta: Tensor | None) -> Tensor:
        trace = None if run.trace is None else run.trace[-1]
        return self._head.of_norm(run.state, delta, self._final_norm, self.eps, trace)

    # --- steps -----------------------------------------------------------------------------------

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
        table = torch.as_tensor(rows, dtype=torch.int64).view(-1, len(ROW_COLUMNS))
        wanted = torch.as_tensor(wanted, dtype=torch.int64)
        self._check_step(cache, table, wanted, hidden)
        kept = (self.all_units if units is None else units).tolist()
        M = table.shape[0]
        if M == 0:
            return self._nothing()
        whole = hidden is None and all(unit == ATTENTION | MLP for unit in kept)
        if prefill or M > MOST_RECORDED or (trace is not None and not whole):
            return self._long_step(cache, table, wanted, kept, trace, hidden, prefill)
        return self._short_step(cache, table, wanted, kept, trace, hidden)

    def _nothing(self) -> StepResult:
        none = torch.empty(0, device=self.device)
        return StepResult(none.view(0, self.sizes.vocabulary), none.long(), none)

    def _short_step(
        self,
        cache: KVCache,
        table: Tensor,
        wanted: Tensor,
        kept: list[int],
        trace: Tensor | None,
        hidden: Tensor | None,
    ) -> StepResult:
        M = table.shape[0]
        size = next(n for n in RECORDED_ROWS if n >= max(M, self._least_rows))
        if size > M:
            table = torch.cat([table, torch.tensor([IDLE_ROW] * (size - M))])
        recorded = self._recorded_for(cache, size)
        run, record = recorded.run, self.record
        run.rows.copy_(table)
        head = wanted.numel() > 0 and hidden is None
        if head and all(unit == ATTENTION | MLP for unit in kept):
            recorded.replay(("whole",), record, lambda: self._whole(recorded))
        else:
            if hidden is None:
                recorded.replay(("embed",), record, lambda: self._embed(run))
            else:
                run.state[:M].copy_(hidden)
            for index, units in enumerate(kept):
                if units:
                    piece = partial(self._piece, run, index, units)
                    recorded.replay((index, units), record, piece)
            if head or wanted.numel() > 0:
                recorded.replay(("head",), record, lambda: self._finish(recorded, None))
            if hidden is not None:
                hidden.copy_(run.state[:M])
        if trace is not None:
            assert run.trace is not None
            trace.copy_(run.trace[:, wanted.to(self.device)])
        if wanted.numel() == 0:
            return self._nothing()
        if wanted.numel() == M and wanted[-1] == M - 1:
            return StepResult(
                recorded.logits[:M].clone(), recorded.best[:M].clone(), recorded.share[:M].clone()
            )
        rows = wanted.to(self.device)
        return StepResult(recorded.logits[rows], recorded.best[rows], recorded.share[rows])

    def _embed(self, run: _Pass) -> None:
        layer_parts.embed_rows(run.rows, self._embedding, run.state)

    def _piece(self, run: _Pass, index: int, units: int) -> None:
        """One layer's kept units, by themselves: what they leave is in the state."""
        untraced = replace(run, trace=None)
        _settle(untraced, self._units(untraced, [units], first=index))

    def _whole(self, recorded: _Recorded) -> None:
        run = recorded.run
        self._embed(run)
        self._finish(recorded, self._units(run, self.all_units.tolist()))

    def _finish(self, recorded: _Recorded, delta: Tensor | None) -> None:
        run = recorded.run
        y = self._logits(run, delta)
        best, share = layer_parts.best_logits(y, recorded.logits, run.scratch)
        recorded.best.copy_(best)
        recorded.share.copy_(share)

    def _long_step(
        self,
        cache: KVCache,
        table: Tensor,
        wanted: Tensor,
        kept: list[int],
        trace: Tensor | None,
        hidden: Tensor | None,
        prompt: bool,
    ) -> StepResult:
        M, D = table.shape[0], self.sizes.hidden
        state = hidden if hidden is not None else torch.empty(M, D, device=self.device)
        run = _Pass(
            table.to(self.device),
            state,
            cache.kv,
            cache.scales,
            self.rotation_for(cache.slots),
            self.scratch_for(M),
            prompt and bool((table[:, 1] == table[0, 1]).all()),
        )
        index = wanted.to(self.device)
        if hidden is None:
            self._embed(run)
        if trace is None:
            _settle(run, self._units(run, kept))
        else:  # of few rows of many, so unit by unit
            trace[0].copy_(run.state[index])
            for layer, units in enumerate(kept):
                for unit in (ATTENTION, MLP):
                    _settle(run, self._units(run, [units & unit], first=layer))
                    trace[2 * layer + 1 + (unit == MLP)].copy_(run.state[index])
        if wanted.numel() == 0:
            return self._nothing()
        last = _Pass(run.rows, run.state[index], run.kv, run.scales, run.rotation, run.scratch)
        y = self._logits(last, None)
        logits = torch.empty(y.shape, device=self.device)
        return StepResult(logits, *layer_parts.best_logits(y, logits, run.scratch))

    # --- drafts ----------------------------------------------------------------------------------

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
        chances = survival.tolist()
        tokens: list[list[int]] = [[] for _ in starts]
        shares: list[list[float]] = [[] for _ in starts]
        stands = [1.0] * len(starts)
        alive = [b for b, start in enumerate(starts) if start[3] > 0]
        least, self._least_rows = self._least_rows, 1  # drafts may differ from the target
        try:
            while alive:
                rows = []
                for b in alive:
                    token, sequence, slot, _ = starts[b]
                    slot += len(tokens[b])
                    token = tokens[b][-1] if tokens[b] else token
                    rows.append([token, sequence, slot, slot, slot + 1, 0])
                result = self.step_rows(cache, rows, range(len(rows)), units)
                going = []
                best, sure = self._best_of(result, head_outputs)
                for b, token, share in zip(alive, best, sure, strict=True):
                    tokens[b].append(token)
                    shares[b].append(share)
                    place = min(max(int(share * CONFIDENCE_BINS), 0), CONFIDENCE_BINS - 1)
                    stands[b] *= chances[place]
                    wanted = len(tokens[b]) < starts[b][3]
                    if wanted and share >= confidence and stands[b] >= worth:
                        going.append(b)
                alive = going
        finally:
            self._least_rows = least
        return tokens, shares

    def _best_of(self, result: StepResult, head_outputs: int) -> tuple[list[int], list[float]]:
        if not 0 < head_outputs < self.sizes.vocabulary:
            return result.best.tolist(), result.share.tolist()
        some = result.logits[:, :head_outputs]
        return some.argmax(-1).tolist(), some.softmax(-1).amax(-1).tolist()

    # --- checks ----------------------------------------------------------------------------------

    def _check_step(
        self, cache: KVCache, rows: Tensor, wanted: Tensor, hidden: Tensor | None
    ) -> None:
        """What the native decoder checks in C++: kernels trust their rows."""
        L, _, sequences, kv_heads, slots, _ = cache.kv.shape
        sizes = self.sizes
        if (L, kv_heads) != (self.layers, sizes.kv_heads) or cache.kv.device != self.device:
            raise SaltireError(
                f"the cache has {L} layers of {kv_heads} heads on {cache.kv.device}; this model "
                f"{self.layers} of {sizes.kv_heads} on {self.device}. It belongs to another model; "
                "make a new one."
            )
        if rows.numel() == 0:
            return
        low, high = rows.amin(0).tolist(), rows.amax(0).tolist()
        if hidden is not None:
            low[0] = high[0] = 0  # tokens are not read
        # As many as its highest bit of the tree says lie behind a row's prefix.
        reach = high[4]
        if low[5] or high[5]:
            bits = [t.bit_length() if t >= 0 else 64 for t in rows[:, 5].tolist()]
            reach = int((rows[:, 4] + torch.tensor(bits)).amax())
        seen = [wanted.amin().item(), wanted.amax().item()] if wanted.numel() else [0, 0]
        for name, least, most, first, after in (
            ("token", low[0], high[0], 0, sizes.vocabulary),
            ("sequence", low[1], high[1], 0, sequences),
            ("position", low[2], high[2], 0, min(sizes.positions, slots)),
            ("slot", low[3], high[3], PRIVATE, slots),
            ("prefix", low[4], reach, 0, slots + 1),
            ("number that is wanted", *seen, 0, rows.shape[0]),
        ):
            if least < first or most >= after:
                raise SaltireError(
                    f"a row has {name} {least if least < first else most}; expected {first} to "
                    f"{after - 1}."
                )
        blind = (rows[:, 4] == 0) & (rows[:, 3] != PRIVATE) & (rows[:, 5] == 0)
        if low[4] == 0 and blind.any():
            raise SaltireError("a row sees no slot.")


def _settle(run: _Pass, delta: Tensor | None) -> None:
    """Add what a unit left to the state."""
    if delta is not None:
        run.state.add_(delta)
