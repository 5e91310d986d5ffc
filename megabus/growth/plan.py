"""Which old entries are sent from which rank to which, when a model grows, is laid out anew, or both.

A plan is computed from two placements alone, so planning needs no communication. Old rows are sent (they are narrower
than new ones) and grown where they arrive. A rank gets every old entry that its new ones are made of, no other, and
none twice, however many copies it makes of it.

Each rank plans for itself and for those it sends to: what a rank receives in which wave follows from its own new
pieces, and a sender repeats that calculation for every rank that needs what it owns. So the cost of planning does not
grow with the world.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from megabus.config import RunConfig, Stage
from megabus.config.precision import FP32_BYTES
from megabus.growth.param_growth import Growth, growth_between
from megabus.parallel.fragments import Kind, sort_of
from megabus.parallel.placement import Piece, Placement
from megabus.parallel.topology import coordinate


class Buffer(NamedTuple):
    """How the memory that a growth may take is divided, in bytes: for the old rows of a wave, and for growing them."""

    old_rows: int
    growing: int

    @classmethod
    def of(cls, total: int) -> Buffer:
        """Half for either."""
        return cls(total // 2, total // 2)


@dataclass(frozen=True)
class RowRange:
    """Old rows [start, stop) of one old parameter; what a rank needs of them, it gets in one wave."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Transfer:
    """Old entries `piece` go from rank `src` to rank `dst` (which may be the same)."""

    src: int
    dst: int
    piece: Piece


ScheduledTransfer = tuple[RowRange, Kind, Transfer]
"""A transfer, the row range of its destination that it belongs to, and which tensor it is of."""


@dataclass(frozen=True)
class Wave:
    """What a rank does at a time: it takes in `ranges`, and these are its own transfers, sent, received and kept.

    Between two ranks the transfers of a wave are in the same order on both.
    """

    ranges: list[RowRange]
    transfers: list[ScheduledTransfer]


@dataclass(frozen=True)
class Required:
    """What a rank needs of a row range: its old rows, ascending, and the entries in them as disjoint ascending spans
    [start, stop). A span that crosses rows crosses only such rows."""

    rows: np.ndarray
    spans: list[tuple[int, int]]


def united(start: np.ndarray, stop: np.ndarray) -> list[tuple[int, int]]:
    """The union of intervals as disjoint ones that do not touch."""
    if len(start) == 0:
        return []
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(stop[order])
    cuts = start[1:] > reach[:-1]
    first, last = np.ones((2, len(start)), bool)
    first[1:] = last[:-1] = cuts
    return list(zip(start[first].tolist(), reach[last].tolist(), strict=True))


def runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Maximal runs [start, stop) of a sorted array of distinct numbers."""
    return united(rows, rows + 1)


@dataclass(frozen=True)
class Plan:
    """Growth from one placement to another of the same world."""

    old: Placement
    new: Placement
    growth: Growth

    @cached_property
    def children(self) -> dict[str, list[str]]:
        """The new parameters that each old one grows into: itself, and its copies in added layers."""
        children: dict[str, list[str]] = {name: [] for name in self.old.specs}
        for name in self.new.specs:
            if (source := self.growth.source(name)) is not None:
                children[source].append(name)
        return children

    def sources(self, rank: int) -> dict[str, list[Piece]]:
        """The old parameters that a rank's new pieces grow from, in canonical order, and the pieces."""
        found: dict[str, list[Piece]] = {}
        for piece in self.new.owned(rank):
            if (source := self.growth.source(piece.name)) is not None:
                found.setdefault(source, []).append(piece)
        return {name: found[name] for name in sorted(found, key=self.old.number)}

    def waves(self, rank: int, old_row_bytes: int, tensors: int) -> list[list[RowRange]]:
        """All old rows that a rank needs in groups, of which each takes at most `old_row_bytes`, for `tensors` tensors;
        a single row may take more. A group is full when the next row has no room in it."""
        budget = max(1, old_row_bytes // (FP32_BYTES * tensors))
        waves: list[list[RowRange]] = []
        room = 0
        for name, pieces in self.sources(rank).items():
            rows, width, at = self._parents(pieces), self.old.width(name), 0
            while at < len(rows):
                if room < width:
                    waves.append([])
                    room = budget
                part = rows[at : at + max(1, room // width)]
                waves[-1].append(RowRange(name, int(part[0]), int(part[-1]) + 1))
                at, room = at + len(part), room - len(part) * width
        return waves

    def schedule(self, rank: int, old_row_bytes: int, kinds: tuple[Kind, ...]) -> list[Wave]:
        """What a rank receives, wave by wave, and what it sends in the waves of others, which go on at the same time.

        old_row_bytes: see `waves`. Ranks cannot wait for each other in a circle: both ends of a transfer post it in the
        same wave.
        """
        mine = self.waves(rank, old_row_bytes, len(kinds))
        transfers = [[each for rows in wave for each in self._scheduled(rank, rows, kinds)] for wave in mine]
        owned = {piece.name: piece for piece in self.old.owned(rank)}
        for dst in self.receivers(rank):
            for number, wave in enumerate(self.waves(dst, old_row_bytes, len(kinds))):
                ranges = [rows for rows in wave if rows.name in owned and self._meets(rows, owned[rows.name])]
                sent = [each for rows in ranges for each in self._scheduled(dst, rows, kinds) if each[2].src == rank]
                if sent:
                    transfers.extend([] for _ in range(number + 1 - len(transfers)))
                    transfers[number].extend(sent)
        return [Wave(ranges or [], each) for ranges, each in zip_longest(mine, transfers)]

    def receivers(self, rank: int) -> list[int]:
        """The other ranks that grow rows from such of which this one owns entries, ascending: it may send to them."""
        found: set[int] = set()
        tp = coordinate(self.old.layout, rank).tp
        for piece in self.old.owned(rank):
            width = self.old.width(piece.name)
            reached = self.destinations(RowRange(piece.name, piece.start // width, -(-piece.stop // width)))
            if not self.old.specs[piece.name].sharded:  # each replica serves its own
                reached = [dst for dst in reached if coordinate(self.old.layout, dst).tp == tp]
            found.update(reached)
        return sorted(found - {rank})

    def _scheduled(self, dst: int, rows: RowRange, kinds: tuple[Kind, ...]) -> Iterator[ScheduledTransfer]:
        for kind in kinds:
            for transfer in self.transfers(dst, rows, kind):
                yield rows, kind, transfer

    def _meets(self, rows: RowRange, piece: Piece) -> bool:
        width = self.old.width(rows.name)
        return rows.start * width < piece.stop and piece.start < rows.stop * width

    def child_rows(self, rows: RowRange, piece: Piece) -> np.ndarray:
        """New rows within `piece` whose parents lie in the row range, ascending."""
        width = self.new.width(piece.name)
        low, high = piece.start // width, -(-piece.stop // width)
        parents = self.growth.param(piece.name).rows.parent[low:high]
        return low + np.flatnonzero((parents >= rows.start) & (parents < rows.stop))

    def destinations(self, rows: RowRange) -> list[int]:
        """The ranks that grow rows from this row range."""
        found: set[int] = set()
        for name in self.children[rows.name]:
            width, number = self.new.width(name), self.new.rows(name)
            for low, high in runs(self.child_rows(rows, Piece(name, 0, number * width))):  # copied heads: several runs
                found.update(rank for rank, _ in self.new.owners(name, low * width, high * width))
        return sorted(found)

    def _parents(self, pieces: list[Piece]) -> np.ndarray:
        """The old rows that new pieces' rows copy, ascending."""
        parents = []
        for piece in pieces:
            width = self.new.width(piece.name)
            parent = self.growth.param(piece.name).rows.parent
            parents.append(parent[piece.start // width : -(-piece.stop // width)])
        return np.unique(np.concatenate(parents))

    def required(self, rows: RowRange, pieces: list[Piece], kind: Kind) -> Required:
        """The old rows of the range, and the entries in them, that the pieces' new entries are made of."""
        starts, stops = [np.zeros(0, int)], [np.zeros(0, int)]
        old_width = self.old.width(rows.name)
        for piece in pieces:
            param, width = self.growth.param(piece.name), self.new.width(piece.name)
            grown = self.child_rows(rows, piece)
            grown = grown[param.live[sort_of(kind)][grown]]
            whole = param.mixing[sort_of(kind)][grown]
            first = np.where(whole, 0, np.maximum(piece.start - grown * width, 0))
            last = np.where(whole, width, np.minimum(piece.stop - grown * width, width)) - 1
            begin = param.rows.parent[grown] * old_width
            starts.append(begin + param.channels.parent[first])
            stops.append(begin + param.channels.parent[last] + 1)
        start, stop = np.concatenate(starts), np.concatenate(stops)
        return Required(np.unique(start // old_width), united(start, stop))

    def transfers(self, dst: int, rows: RowRange, kind: Kind = "weight") -> Iterator[Transfer]:
        """All transfers that bring rank `dst` what it needs of a row range, in ascending order of entries.

        A replicated parameter comes from the replica with the destination's own place in tensor parallelism: its own
        copy if it has one, and else neighbours ask different replicas.
        """
        tp = coordinate(self.old.layout, dst).tp
        pieces = [piece for name in self.children[rows.name] if len(piece := self.new.share(name, dst))]
        for start, stop in self.required(rows, pieces, kind).spans:
            for src, part in self.old.owners(rows.name, start, stop, tp):
                yield Transfer(src, dst, part)


def plan_between(config: RunConfig, old: Stage, new: Stage) -> Plan:
    """Of the growth from one stage of a run into the next."""
    before, after = (Placement(stage.model, stage.layout) for stage in (old, new))
    return Plan(before, after, growth_between(config, old, new))


def schedule_of(config: RunConfig, plan: Plan, rank: int) -> list[Wave]:
    """What a rank does in a growth of this run once it has taken steps."""
    return plan.schedule(rank, Buffer.of(config.growth.buffer_bytes).old_rows, plan.growth.sent_kinds)
