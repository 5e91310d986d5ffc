"""Who owns which fp32 master entries under a layout: pure arithmetic, no process group, no tensor.

Tensor parallelism cuts rows, pipelines cut layers, ZeRO cuts each rank's flattened parameters into equal
partitions. All three leave one interval of a parameter's global row-major flattening on each rank, so ownership
is interval algebra.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from megabus.config.schema import ModelConfig
from megabus.config.stages import Layout
from megabus.model.decoder import param_specs
from megabus.model.params import Axis, ParamSpec, axis_sizes, shard_rows
from megabus.parallel.topology import coordinate, pp_rank_of, rank_of

ZERO_ALIGNMENT = 2  # DeepSpeed pads a flattened group to a multiple of this times dp


@dataclass(frozen=True)
class Piece:
    """Entries [start, stop) of a parameter's global flattening."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class _Slot:
    """A parameter on one (pp, tp) rank: its global interval and where it begins in its ZeRO group."""

    piece: Piece
    offset: int
    partition: int  # entries a data-parallel rank owns of that group


@dataclass(frozen=True)
class ZeroGroup:
    """A parameter group of a (pp, tp) rank: the entries that it computes with, and those that it owns, which is a
    partition with its padding."""

    entries: int
    partition: int


@dataclass(frozen=True)
class Placement:
    """A model under a layout."""

    model: ModelConfig
    layout: Layout

    @cached_property
    def specs(self) -> dict[str, ParamSpec]:
        return param_specs(self.model)

    def width(self, name: str) -> int:
        """Entries of a row."""
        return self.model.d_model if self.specs[name].is_matrix else 1

    def numel(self, name: str) -> int:
        return self.rows(name) * self.width(name)

    def number(self, name: str) -> int:
        """A parameter's place in canonical order."""
        return self._numbers[name]

    def pp_rank(self, name: str) -> int:
        """Which pipeline rank holds a parameter."""
        layer = self.specs[name].layer
        if layer is not None:
            return pp_rank_of(self.model.n_layers, self.layout.pp, layer)
        return 0 if name in self._before_layers else self.layout.pp - 1

    @cached_property
    def _before_layers(self) -> set[str]:
        names = list(self.specs)
        first = next((i for i, name in enumerate(names) if self.specs[name].layer is not None), 0)
        return set(names[:first])

    def names(self, pp: int) -> list[str]:
        """The parameters of a pipeline rank, in canonical order."""
        return self._by_pp_rank[pp]

    @cached_property
    def _by_pp_rank(self) -> list[list[str]]:
        names: list[list[str]] = [[] for _ in range(self.layout.pp)]
        for name in self.specs:
            names[self.pp_rank(name)].append(name)
        return names

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.specs)}

    @cached_property
    def _sizes(self) -> dict[Axis, int]:
        return axis_sizes(self.model)

    @cached_property
    def _known_slots(self) -> dict[tuple[int, int], dict[str, _Slot]]:
        return {}

    def _slots(self, pp: int, tp: int) -> dict[str, _Slot]:
        """The parameters of a (pp, tp) rank in order, matrices and gains being separate ZeRO groups. Kept once made:
        of a large world most ranks meet few others."""
        if (pp, tp) not in self._known_slots:
            self._known_slots[pp, tp] = self._rank_slots(pp, tp)
        return self._known_slots[pp, tp]

    def _rank_slots(self, pp: int, tp: int) -> dict[str, _Slot]:
        slots: dict[str, _Slot] = {}
        for matrices in (True, False):
            group, total = {}, 0
            for name in self._by_pp_rank[pp]:
                spec = self.specs[name]
                if spec.is_matrix == matrices:
                    start, stop = shard_rows(spec, self.model, self.layout.tp, tp)
                    width = self.width(name)
                    group[name] = (Piece(name, start * width, stop * width), total)
                    total += (stop - start) * width
            partition = self._partition(total)
            slots |= {name: _Slot(piece, offset, partition) for name, (piece, offset) in group.items()}
        return slots

    def _partition(self, entries: int) -> int:
        return -(-entries // (ZERO_ALIGNMENT * self.layout.dp)) * ZERO_ALIGNMENT

    def groups(self, pp: int, tp: int) -> tuple[ZeroGroup, ZeroGroup]:
        """Of the matrices, and of the gains, of every rank at (pp, tp)."""
        entries = {True: 0, False: 0}
        for name in self._by_pp_rank[pp]:
            start, stop = shard_rows(self.specs[name], self.model, self.layout.tp, tp)
            entries[self.specs[name].is_matrix] += (stop - start) * self.width(name)
        matrices, gains = (ZeroGroup(n, self._partition(n)) for n in (entries[True], entries[False]))
        return matrices, gains

    def owned(self, rank: int) -> list[Piece]:
        """The non-empty intervals of masters (and moments) that a rank owns, in canonical order."""
        at = coordinate(self.layout, rank)
        slots = self._slots(at.pp, at.tp)
        pieces = (_share(slots[name], at.dp) for name in self._by_pp_rank[at.pp])
        return [piece for piece in pieces if len(piece) > 0]

    def owners(self, name: str, start: int, stop: int, tp: int | None = None) -> Iterator[tuple[int, Piece]]:
        """Ranks that own a part of [start, stop) and the part. A parameter that tensor parallelism replicates has
        one owner for each tp rank; `tp` picks one of them."""
        pp, layout = self.pp_rank(name), self.layout
        if self.specs[name].sharded:
            shards: Iterable[int] = self._shards(name, start, stop)
        else:
            shards = range(layout.tp) if tp is None else [tp % layout.tp]
        for tp_rank in shards:
            slot = self._slots(pp, tp_rank)[name]
            low, high = max(start, slot.piece.start), min(stop, slot.piece.stop)
            if low >= high:
                continue
            base = slot.offset - slot.piece.start
            for dp in range((low + base) // slot.partition, (high - 1 + base) // slot.partition + 1):
                part = _share(slot, dp)
                owned = Piece(name, max(low, part.start), min(high, part.stop))
                yield rank_of(layout, pp, dp, tp_rank), owned

    def _shards(self, name: str, start: int, stop: int) -> range:
        """Tensor-parallel ranks whose shards [r * n // tp, (r + 1) * n // tp) of n rows meet entries [start, stop)."""
        width, n, tp = self.width(name), self.rows(name), self.layout.tp
        if start >= stop:
            return range(0)
        first, last = start // width, (stop - 1) // width
        return range(((first + 1) * tp - 1) // n, ((last + 1) * tp - 1) // n + 1)

    def shard(self, name: str, rank: int) -> Piece:
        """The interval that a rank computes with: its tensor-parallel shard, whoever owns the masters."""
        at = coordinate(self.layout, rank)
        return self._slots(at.pp, at.tp)[name].piece

    def share(self, name: str, rank: int) -> Piece:
        """The interval of one parameter that a rank owns; empty if it owns nothing of it."""
        at = coordinate(self.layout, rank)
        slot = self._slots(at.pp, at.tp).get(name)
        return Piece(name, 0, 0) if slot is None else _share(slot, at.dp)

    def rows(self, name: str) -> int:
        return self._sizes[self.specs[name].rows]


def _share(slot: _Slot, dp: int) -> Piece:
    """What data-parallel rank `dp` owns of a slot (empty if its partition lies elsewhere)."""
    low = max(slot.offset, dp * slot.partition)
    high = min(slot.offset + len(slot.piece), (dp + 1) * slot.partition)
    base = slot.piece.start - slot.offset
    return Piece(slot.piece.name, low + base, max(low, high) + base)
