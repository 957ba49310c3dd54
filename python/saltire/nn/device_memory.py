"""Memory that steps on a device share: caches with what was recorded for them, tables, counters."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from saltire.nn.decoder import DecoderSizes
from saltire.nn.kv_cache import KVCache
from saltire.nn.recording import Recorder, Replay
from saltire.ops import layer_parts
from saltire.ops.decoder_layer import PRIVATE

CACHES = 4  # whose memory and graphs are kept
SLOTS = (256, 512)  # of a cache, then multiples of 1,024: so that many a new cache finds graphs
IDLE_ROW = [0, 0, 0, PRIVATE, 0, 0]  # sees itself only, writes nothing: fills a step up


@dataclass
class Pass:
    """What a step runs on. rows: int64 [M, 6]. state: f32 [M, D]. trace: f32 [2L + 1, M, D] or
    None, the states between all units."""

    rows: Tensor
    state: Tensor
    kv: Tensor
    scales: Tensor | None
    rotation: Tensor
    scratch: Tensor
    prompt: bool = False
    trace: Tensor | None = None


class Recorded:
    """The memory and the graphs of steps of M rows on one cache."""

    def __init__(self, run: Pass, vocabulary: int) -> None:
        self.run = run
        M, device = run.rows.shape[0], run.rows.device
        self.logits = torch.zeros(M, vocabulary, device=device)
        self.best = torch.zeros(M, dtype=torch.int64, device=device)
        self.share = torch.zeros(M, device=device)
        self._pieces: dict[tuple[object, ...], Replay] = {}

    def replay(self, name: tuple[object, ...], record: Recorder, work: Callable[[], None]) -> None:
        """Do a piece of work, recorded the first time."""
        if name not in self._pieces:
            self._pieces[name] = record(work, [self.run.state, self.run.rows])
        self._pieces[name]()

    def set_rows(self, rows: list[list[int]]) -> None:
        """What the next replay works on; idle rows fill it up."""
        idle = self.run.rows.shape[0] - len(rows)
        table = torch.tensor(rows + [IDLE_ROW] * idle)
        if self.run.rows.device.type == "cuda":
            # From pinned memory the copy waits for its turn without holding up whoever asks.
            table = table.pin_memory()
        self.run.rows.copy_(table, non_blocking=True)


class _Home:
    """The memory of a cache, which outlives it, and what works there."""

    def __init__(self, cache: KVCache) -> None:
        self.kv, self.scales, self.owner = cache.kv, cache.scales, weakref.ref(cache)
        self.sizes: dict[int, Recorded] = {}


class DeviceMemory:
    """All that belongs to one decoder's steps."""

    def __init__(
        self,
        sizes: DecoderSizes,
        layers: int,
        rotation: Callable[[Tensor], tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        self.sizes, self.layers, self.device = sizes, layers, device
        self._rotation_of = rotation
        self._rotation = torch.empty(0, 2, sizes.head_dim // 2)
        self._scratch = torch.zeros(0, dtype=torch.int32, device=device)
        self._homes: OrderedDict[int, _Home] = OrderedDict()  # by where their keys lie

    @property
    def recorded_rows(self) -> list[list[int]]:
        """For each cache whose graphs are kept, for how many rows there are some."""
        return [list(home.sizes) for home in self._homes.values()]

    def slots_for(self, slots: int) -> int:
        """As many as a cache that is to hold so many gets, within the model's positions."""
        room = next((n for n in SLOTS if n >= slots), -(-slots // 1024) * 1024)
        return max(slots, min(room, self.sizes.positions))

    def vacant(self, sequences: int, slots: int, dtype: torch.dtype) -> KVCache | None:
        """A cache where an earlier one lay, if one of that shape is free: what was recorded there
        serves again."""
        sizes = self.sizes
        shape = (self.layers, sizes.kv_heads, sizes.head_dim, sequences, slots, dtype)
        cache = KVCache(*shape, torch.device("meta"))
        for home in self._homes.values():
            alike = home.kv.shape == cache.kv.shape and home.kv.dtype == cache.kv.dtype
            if alike and home.owner() is None:
                cache.adopt(home.kv, home.scales)
                home.owner = weakref.ref(cache)
                return cache
        return None

    def recorded(self, cache: KVCache, M: int) -> Recorded:
        """What there is, or will be, for steps of M rows on a cache."""
        place = cache.kv.data_ptr()
        home = self._homes.get(place)
        if home is None or home.kv is not cache.kv:
            home = self._homes[place] = _Home(cache)
        self._homes.move_to_end(place)
        while len(self._homes) > CACHES:
            self._homes.popitem(last=False)
        if M not in home.sizes:
            rows = torch.tensor([IDLE_ROW] * M, device=self.device)
            D = self.sizes.hidden
            run = self.on(cache, rows, torch.zeros(M, D, device=self.device))
            run.trace = torch.zeros(2 * self.layers + 1, M, D, device=self.device)
            home.sizes[M] = Recorded(run, self.sizes.vocabulary)
        return home.sizes[M]

    def on(self, cache: KVCache, rows: Tensor, state: Tensor, prompt: bool = False) -> Pass:
        """A pass over a cache."""
        rotation, scratch = self._rotation_for(cache.slots), self._scratch_for(rows.shape[0])
        return Pass(rows, state, cache.kv, cache.scales, rotation, scratch, prompt)

    def _rotation_for(self, positions: int) -> Tensor:
        if positions > self._rotation.shape[0]:
            places = torch.arange(positions, device=self.device)
            cosines, sines = self._rotation_of(places)
            self._rotation = torch.stack([cosines, sines], dim=1).float().contiguous()
        return self._rotation

    def _scratch_for(self, rows: int) -> Tensor:
        sizes = self.sizes
        count = max(rows, layer_parts.attention_counters(rows, sizes.heads, sizes.kv_heads))
        if count > self._scratch.numel():
            self._scratch = torch.zeros(count, dtype=torch.int32, device=self.device)
        return self._scratch
