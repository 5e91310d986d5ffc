"""Which old entries travel from which rank to which, when a model grows, is laid out anew, or both.

Pure: a plan is computed from two placements alone, on every rank alike, so that senders and receivers agree
without a word. Old rows travel (they are narrower than new ones) and are grown where they arrive. A rank gets
every old entry that its new ones are made of, no other, and none twice, however many copies it makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from megabus.growth.maps import AxisMap
from megabus.growth.rules import Growth
from megabus.parallel.fragments import Kind
from megabus.parallel.placement import Piece, Placement
from megabus.parallel.topology import coordinate

ELEMENT_BYTES = 4  # masters and moments are fp32


@dataclass(frozen=True)
class Unit:
    """Old rows [start, stop) of one old parameter: what moves together."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Move:
    """Old entries `piece` go from rank `src` to rank `dst` (which may be the same)."""

    src: int
    dst: int
    piece: Piece


@dataclass(frozen=True)
class Traffic:
    """Bytes that change hands, and that need not."""

    sent: int
    kept: int


@dataclass(frozen=True)
class Need:
    """What a rank needs of a unit: its old rows, ascending, and the entries in them as disjoint ascending spans
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
    return list(zip(start[np.r_[True, cuts]].tolist(), reach[np.r_[cuts, True]].tolist(), strict=True))


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
    def heirs(self) -> dict[str, list[str]]:
        """The new parameters that each old one grows into: itself, and its copies in inserted layers."""
        heirs: dict[str, list[str]] = {name: [] for name in self.old.specs}
        for name, spec in self.new.specs.items():
            heirs[self.growth.old_spec(spec).name].append(name)
        return heirs

    def waves(self, table_bytes: int, tensors: int) -> list[list[Unit]]:
        """All units in groups, such that what a rank needs of a group takes it at most `table_bytes`, for `tensors`
        tensors each; a single row may take more.

        A unit joins the first group in which all ranks that need it have room behind what they have already, so that
        ranks with nothing in common work side by side.
        """
        budget = max(1, table_bytes // (ELEMENT_BYTES * tensors))
        waves: list[list[Unit]] = []
        last, load = np.zeros((2, self.old.layout.world), int)  # every rank's latest group, and entries in it
        for unit in self._units(budget):
            found = [(rank, len(self._parents(unit, pieces))) for rank, pieces in self.destinations(unit).items()]
            ranks = np.array([rank for rank, _ in found], int)
            cost = np.array([rows for _, rows in found], int) * self.old.width(unit.name)
            wave = int((last[ranks] + (load[ranks] + cost > budget) * (load[ranks] > 0)).max(initial=0))
            load[ranks] = np.where(last[ranks] == wave, load[ranks], 0) + cost
            last[ranks] = wave
            if wave == len(waves):
                waves.append([])
            waves[wave].append(unit)
        return waves

    def _units(self, budget: int) -> Iterator[Unit]:
        """Every old row, in canonical order; at most `budget` entries a unit."""
        for name in self.old.specs:
            step, rows = max(1, budget // self.old.width(name)), self.old.rows(name)
            for start in range(0, rows, step):
                yield Unit(name, start, min(start + step, rows))

    def rows(self, name: str) -> AxisMap:
        return self.growth.rows(self.new.specs[name])

    def children(self, unit: Unit, piece: Piece) -> np.ndarray:
        """New rows within `piece` whose parents lie in the unit, ascending."""
        width = self.new.width(piece.name)
        low, high = piece.start // width, -(-piece.stop // width)
        parents = self.rows(piece.name).parent[low:high]
        return low + np.flatnonzero((parents >= unit.start) & (parents < unit.stop))

    def destinations(self, unit: Unit) -> dict[int, list[Piece]]:
        """Who grows rows from this unit, and which of its pieces they go to."""
        found: dict[int, list[Piece]] = {}
        for name in self.heirs[unit.name]:
            width = self.new.width(name)
            children = self.children(unit, Piece(name, 0, self.new.numel(name)))
            low, high = int(children[0]), int(children[-1]) + 1
            for rank, _ in self.new.owners(name, low * width, high * width):
                piece = self.new.share(name, rank)
                if len(self.children(unit, piece)):  # copied heads: children of a unit need not lie side by side
                    found.setdefault(rank, []).append(piece)
        return found

    def _parents(self, unit: Unit, pieces: list[Piece]) -> np.ndarray:
        parents = [self.rows(piece.name).parent[self.children(unit, piece)] for piece in pieces]
        return np.unique(np.concatenate(parents)) if parents else np.zeros(0, int)

    def need(self, unit: Unit, pieces: list[Piece], kind: Kind) -> Need:
        """The old rows of the unit, and the entries in them, that the pieces' new entries are made of."""
        starts, stops = [np.zeros(0, int)], [np.zeros(0, int)]
        old_width = self.old.width(unit.name)
        for piece in pieces:
            spec, width = self.new.specs[piece.name], self.new.width(piece.name)
            rows = self.children(unit, piece)
            rows = rows[self.growth.live(spec, kind)[rows]]
            whole = self.growth.mixing(spec, kind)[rows]
            columns = self.growth.columns(spec)
            first = np.where(whole, 0, np.maximum(piece.start - rows * width, 0))
            last = np.where(whole, width, np.minimum(piece.stop - rows * width, width)) - 1
            begin = self.rows(piece.name).parent[rows] * old_width
            starts.append(begin + columns[first])
            stops.append(begin + columns[last] + 1)
        start, stop = np.concatenate(starts), np.concatenate(stops)
        return Need(np.unique(start // old_width), united(start, stop))

    def moves(self, unit: Unit, kind: Kind = "weight", rank: int | None = None) -> Iterator[Move]:
        """All moves of a unit, or those that `rank` sends or receives; the order is the same on every rank."""
        sources = None if rank is None else {r for r, _ in self._owners(unit)}
        for dst, pieces in sorted(self.destinations(unit).items()):
            if sources is not None and rank != dst and rank not in sources:
                continue
            tp = coordinate(self.old.layout, dst).tp
            for start, stop in self.need(unit, pieces, kind).spans:
                for src, part in self.old.owners(unit.name, start, stop, tp):
                    if rank is None or rank in (src, dst):
                        yield Move(src, dst, part)

    def _owners(self, unit: Unit) -> Iterator[tuple[int, Piece]]:
        width = self.old.width(unit.name)
        return self.old.owners(unit.name, unit.start * width, unit.stop * width)

    def traffic(self, kinds: tuple[Kind, ...] = ("weight",)) -> Traffic:
        """What the whole world sends, and what stays where it is."""
        sent = kept = 0
        for name, kind in product(self.old.specs, kinds):
            for move in self.moves(Unit(name, 0, self.old.rows(name)), kind):
                if move.src == move.dst:
                    kept += len(move.piece)
                else:
                    sent += len(move.piece)
        return Traffic(sent * ELEMENT_BYTES, kept * ELEMENT_BYTES)
