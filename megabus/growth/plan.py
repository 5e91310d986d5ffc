"""Which old entries travel from which rank to which, when a model grows, is laid out anew, or both.

Pure: a plan is computed from two placements alone, on every rank alike, so that senders and receivers agree
without a word. Old rows travel (they are narrower than new ones) and are grown where they arrive. A rank gets
every old entry at most once, however many copies it makes of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megabus.growth.maps import AxisMap
from megabus.growth.rules import Growth
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
    """Bytes for one tensor a parameter (weights alone, or one moment)."""

    sent: int
    kept: int


def runs(rows: np.ndarray) -> list[tuple[int, int]]:
    """Maximal runs [start, stop) of a sorted array of distinct numbers."""
    if len(rows) == 0:
        return []
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(rows, cuts)]


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

    def waves(self, buffer_bytes: int, tensors: int) -> Iterator[list[Unit]]:
        """Units in canonical order, in groups of at most `buffer_bytes` of old entries, `tensors` tensors each."""
        wave: list[Unit] = []
        room = budget = max(1, buffer_bytes // (ELEMENT_BYTES * tensors))
        for name in self.old.specs:
            width = self.old.width(name)
            step = max(1, budget // width)
            for start in range(0, self.old.rows(name), step):
                unit = Unit(name, start, min(start + step, self.old.rows(name)))
                cost = (unit.stop - unit.start) * width
                if cost > room and wave:
                    yield wave
                    wave, room = [], budget
                wave.append(unit)
                room -= cost
        yield wave

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
            for rank, piece in self.new.owners(name, 0, self.new.numel(name)):
                found.setdefault(rank, []).append(piece)
        return found

    def needs(self, unit: Unit, pieces: list[Piece]) -> np.ndarray:
        """Old rows of the unit that the pieces' new rows copy, ascending and distinct."""
        parents = [self.rows(piece.name).parent[self.children(unit, piece)] for piece in pieces]
        return np.unique(np.concatenate(parents))

    def moves(self, unit: Unit, rank: int | None = None) -> Iterator[Move]:
        """All moves of a unit, or those that `rank` sends or receives; the order is the same on every rank."""
        width = self.old.width(unit.name)
        sources = None if rank is None else {r for r, _ in self._owners(unit)}
        for dst, pieces in sorted(self.destinations(unit).items()):
            if sources is not None and rank != dst and rank not in sources:
                continue
            tp = coordinate(self.old.layout, dst).tp
            for start, stop in runs(self.needs(unit, pieces)):
                for src, part in self.old.owners(unit.name, start * width, stop * width, tp):
                    if rank is None or rank in (src, dst):
                        yield Move(src, dst, part)

    def _owners(self, unit: Unit) -> Iterator[tuple[int, Piece]]:
        width = self.old.width(unit.name)
        return self.old.owners(unit.name, unit.start * width, unit.stop * width)

    def traffic(self) -> Traffic:
        """What the whole world sends, and what stays where it is."""
        sent = kept = 0
        for name in self.old.specs:
            for move in self.moves(Unit(name, 0, self.old.rows(name))):
                if move.src == move.dst:
                    kept += len(move.piece)
                else:
                    sent += len(move.piece)
        return Traffic(sent * ELEMENT_BYTES, kept * ELEMENT_BYTES)
