"""Which old entries travel from which rank to which, when a model grows, is laid out anew, or both.

Pure: a plan is computed from two placements alone, so that senders and receivers agree without a word. Old rows
travel (they are narrower than new ones) and are grown where they arrive. A rank gets every old entry that its new
ones are made of, no other, and none twice, however many copies it makes of it.

The receiver decides: what arrives in which wave follows from its own new pieces. A sender finds those who need what
it owns and repeats their reckoning, so a rank computes no more than what it and its correspondents hold, in a world
of whatever size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np

from megabus.config import RunConfig, Stage
from megabus.growth.maps import AxisMap
from megabus.growth.rules import Growth
from megabus.parallel.fragments import KINDS, Kind
from megabus.parallel.placement import Piece, Placement
from megabus.parallel.topology import coordinate

ELEMENT_BYTES = 4  # masters and moments are fp32


@dataclass(frozen=True)
class Unit:
    """Old rows [start, stop) of one old parameter: what moves together to a rank, as far as that needs them."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Move:
    """Old entries `piece` go from rank `src` to rank `dst` (which may be the same)."""

    src: int
    dst: int
    piece: Piece


Part = tuple[Unit, Kind, Move]
"""A move with what it is part of: the unit of its destination, and which tensor."""


@dataclass(frozen=True)
class Wave:
    """What a rank does at a time: it takes in `units`, and these are its own moves, sent, received and kept.

    Between two ranks the moves of a wave are in the same order on both.
    """

    units: list[Unit]
    moves: list[Part]


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
        """The new parameters that each old one grows into: itself, and its copies in added layers."""
        heirs: dict[str, list[str]] = {name: [] for name in self.old.specs}
        for name, spec in self.new.specs.items():
            heirs[self.growth.old_spec(spec).name].append(name)
        return heirs

    def needs(self, rank: int) -> dict[str, list[Piece]]:
        """The old parameters that a rank's new pieces grow from, in canonical order, and the pieces."""
        found: dict[str, list[Piece]] = {}
        for piece in self.new.owned(rank):
            found.setdefault(self.growth.old_spec(self.new.specs[piece.name]).name, []).append(piece)
        return {name: found[name] for name in sorted(found, key=self.old.number)}

    def waves(self, rank: int, table_bytes: int, tensors: int) -> list[list[Unit]]:
        """All old rows that a rank needs in groups, such that what it needs of a group takes it at most `table_bytes`,
        for `tensors` tensors each; a single row may take more. A group is full when the next row has no room in it."""
        budget = max(1, table_bytes // (ELEMENT_BYTES * tensors))
        waves: list[list[Unit]] = []
        room = 0
        for name, pieces in self.needs(rank).items():
            rows, width, at = self._parents(pieces), self.old.width(name), 0
            while at < len(rows):
                if room < width:
                    waves.append([])
                    room = budget
                part = rows[at : at + max(1, room // width)]
                waves[-1].append(Unit(name, int(part[0]), int(part[-1]) + 1))
                at, room = at + len(part), room - len(part) * width
        return waves

    def schedule(self, rank: int, table_bytes: int, kinds: tuple[Kind, ...]) -> list[Wave]:
        """What a rank receives, wave by wave, and what it sends in the waves of others, which go on at the same time.

        table_bytes: see `waves`. Nobody waits in a circle: what a wave waits for is posted in the same wave.
        """
        mine = self.waves(rank, table_bytes, len(kinds))
        moves = [[part for unit in wave for part in self._parts(rank, unit, kinds)] for wave in mine]
        owned = {piece.name: piece for piece in self.old.owned(rank)}
        for dst in self.correspondents(rank):
            for number, wave in enumerate(self.waves(dst, table_bytes, len(kinds))):
                units = [unit for unit in wave if unit.name in owned and self._meets(unit, owned[unit.name])]
                sent = [part for unit in units for part in self._parts(dst, unit, kinds) if part[2].src == rank]
                if sent:
                    moves.extend([] for _ in range(number + 1 - len(moves)))
                    moves[number].extend(sent)
        return [Wave(units or [], parts) for units, parts in zip_longest(mine, moves)]

    def correspondents(self, rank: int) -> list[int]:
        """Other ranks that grow rows from such of which this one owns entries, ascending: whom it may send to."""
        found: set[int] = set()
        tp = coordinate(self.old.layout, rank).tp
        for piece in self.old.owned(rank):
            width = self.old.width(piece.name)
            reached = self.destinations(Unit(piece.name, piece.start // width, -(-piece.stop // width)))
            if not self.old.specs[piece.name].sharded:  # each replica serves its own
                reached = [dst for dst in reached if coordinate(self.old.layout, dst).tp == tp]
            found.update(reached)
        return sorted(found - {rank})

    def _parts(self, dst: int, unit: Unit, kinds: tuple[Kind, ...]) -> Iterator[Part]:
        for kind in kinds:
            for move in self.moves(dst, unit, kind):
                yield unit, kind, move

    def _meets(self, unit: Unit, piece: Piece) -> bool:
        width = self.old.width(unit.name)
        return unit.start * width < piece.stop and piece.start < unit.stop * width

    def rows(self, name: str) -> AxisMap:
        return self.growth.rows(self.new.specs[name])

    def children(self, unit: Unit, piece: Piece) -> np.ndarray:
        """New rows within `piece` whose parents lie in the unit, ascending."""
        width = self.new.width(piece.name)
        low, high = piece.start // width, -(-piece.stop // width)
        parents = self.rows(piece.name).parent[low:high]
        return low + np.flatnonzero((parents >= unit.start) & (parents < unit.stop))

    def destinations(self, unit: Unit) -> list[int]:
        """Who grows rows from this unit."""
        found: set[int] = set()
        for name in self.heirs[unit.name]:
            width, number = self.new.width(name), self.new.rows(name)
            for low, high in runs(self.children(unit, Piece(name, 0, number * width))):  # copied heads lie in several
                found.update(rank for rank, _ in self.new.owners(name, low * width, high * width))
        return sorted(found)

    def _parents(self, pieces: list[Piece]) -> np.ndarray:
        """The old rows that new pieces' rows copy, ascending."""
        parents = []
        for piece in pieces:
            width = self.new.width(piece.name)
            parents.append(self.rows(piece.name).parent[piece.start // width : -(-piece.stop // width)])
        return np.unique(np.concatenate(parents))

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

    def moves(self, dst: int, unit: Unit, kind: Kind = "weight") -> Iterator[Move]:
        """All moves that bring rank `dst` what it needs of a unit, in ascending order of entries.

        A replicated parameter comes from the replica with the destination's own place in tensor parallelism: its own
        copy if it has one, and else neighbours ask different replicas.
        """
        tp = coordinate(self.old.layout, dst).tp
        pieces = [piece for name in self.heirs[unit.name] if len(piece := self.new.share(name, dst))]
        for start, stop in self.need(unit, pieces, kind).spans:
            for src, part in self.old.owners(unit.name, start, stop, tp):
                yield Move(src, dst, part)


def growth_between(config: RunConfig, old: Stage, new: Stage) -> Growth:
    """The seed is the run's: directions are keyed by parameter, row and new shape, so no two growths share any."""
    return Growth(old.model, new.model, config.growth, config.train.seed)


def plan_between(config: RunConfig, old: Stage, new: Stage) -> Plan:
    """Of the growth from one stage of a run into the next."""
    before, after = (Placement(stage.model, stage.layout) for stage in (old, new))
    return Plan(before, after, growth_between(config, old, new))


def travelling(config: RunConfig) -> tuple[Kind, ...]:
    """The tensors that go along in a growth of a run that has taken steps."""
    return ("weight",) if config.growth.moments == "reset" else KINDS


def schedule_of(config: RunConfig, plan: Plan, rank: int) -> list[Wave]:
    """What a rank does in a growth of this run: half of its buffer is for old rows, half for growing them."""
    return plan.schedule(rank, config.growth.buffer_mb * 2**20 // 2, travelling(config))
