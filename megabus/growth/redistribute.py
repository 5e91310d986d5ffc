"""Carry out a plan point to point: shards arrive, grow on arrival, and no rank ever holds a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabus.growth.plan import Part, Plan, Unit, runs
from megabus.growth.rules import BLOCK_BYTES, grow_blocks
from megabus.parallel.fragments import Fragments, Kind
from megabus.parallel.placement import Piece


@dataclass
class Mail:
    """Bytes that this rank really sent to others, and that it had already."""

    sent: int = 0
    kept: int = 0


@dataclass(frozen=True)
class Table:
    """Old rows that this rank needs, of one tensor: side by side in `values` (len(rows) * width,), which hold no more
    than is needed of each."""

    rows: np.ndarray
    values: Tensor

    def part(self, piece: Piece) -> Tensor:
        """Where old entries lie; they are all within one run of rows."""
        width = len(self.values) // len(self.rows)
        start = int(np.searchsorted(self.rows, piece.start // width)) * width + piece.start % width
        return self.values[start : start + len(piece)]

    def fetch(self, parents: np.ndarray) -> Tensor:
        """Old rows (B, width), or (B,) where the width is 1; any row at all for one that is not here."""
        at = np.searchsorted(self.rows, parents).clip(max=len(self.rows) - 1)
        values = self.values.view(len(self.rows), -1).squeeze(1)
        return values[torch.from_numpy(at).to(values.device)]


Tables = dict[tuple[Unit, Kind], Table]
Tensors = Mapping[str, tuple[Piece, dict[Kind, Tensor]]]
"""Fragments by the parameter's name."""


def redistribute(
    plan: Plan, owned: Fragments, kinds: tuple[Kind, ...], rank: int, buffer_bytes: int
) -> tuple[Fragments, Mail]:
    """This rank's fragments under the new placement, grown from everybody's old ones. Collective.

    owned: this rank's fragments under the old placement. kinds: which tensors go along. buffer_bytes: the most memory
    to take beside `owned` and what is returned, as long as it holds two rows and what growing one takes
    (`rules.row_bytes`).
    """
    device = next(iter(owned.values()))["weight"].device
    grown: Fragments = {  # zeros: what is grown from nothing is not computed either
        piece: {kind: torch.zeros(len(piece), device=device) for kind in kinds} for piece in plan.new.owned(rank)
    }
    mail = Mail()
    old = {piece.name: (piece, tensors) for piece, tensors in owned.items()}
    new = {piece.name: (piece, tensors) for piece, tensors in grown.items()}
    half = buffer_bytes // 2  # for the old rows of a wave; the other half for growing them
    limit = min(half, BLOCK_BYTES) if device.type == "cpu" else half  # a GPU likes its blocks as large as can be
    for wave in plan.schedule(rank, half, kinds):
        tables = _empty_tables(plan, wave.units, kinds, new, device)
        _exchange(wave.moves, old, tables, rank, mail)
        while tables:
            _grow_table(plan, *tables.popitem(), new, limit)
    return grown, mail


def _heirs(plan: Plan, unit: Unit, new: Tensors) -> list[tuple[Piece, dict[Kind, Tensor]]]:
    """This rank's part of the new parameters that grow from the unit's."""
    return [new[name] for name in plan.heirs[unit.name] if name in new]


def _empty_tables(plan: Plan, units: list[Unit], kinds: tuple[Kind, ...], new: Tensors, device: torch.device) -> Tables:
    tables: Tables = {}
    for unit, kind in product(units, kinds):
        rows = plan.need(unit, [piece for piece, _ in _heirs(plan, unit, new)], kind).rows
        if len(rows):
            tables[unit, kind] = Table(rows, torch.empty(len(rows) * plan.old.width(unit.name), device=device))
    return tables


def _grow_table(plan: Plan, what: tuple[Unit, Kind], table: Table, new: Tensors, limit: int) -> None:
    """Turn a unit's old rows into all new rows that this rank owns of it."""
    unit, kind = what
    for piece, tensors in _heirs(plan, unit, new):
        for low, high in runs(plan.children(unit, piece)):
            for first, block in grow_blocks(plan.growth, piece.name, kind, low, high, table.fetch, limit):
                _place(block.view(-1), first * plan.new.width(piece.name), piece, tensors[kind])


def _exchange(moves: list[Part], old: Tensors, tables: Tables, rank: int, mail: Mail) -> None:
    """Fill the tables with what this rank has and what others send. Straight from masters into tables: no copies are
    made to be sent. Between two ranks messages go in the order of moves."""
    jobs = []
    for unit, kind, move in moves:
        if move.src == rank:
            whole, tensors = old[unit.name]
            letter = tensors[kind][move.piece.start - whole.start : move.piece.stop - whole.start]
        if move.src == move.dst:
            tables[unit, kind].part(move.piece).copy_(letter)
            mail.kept += letter.nbytes
        elif move.src == rank:
            jobs.append(dist.P2POp(dist.isend, letter, move.dst))
            mail.sent += letter.nbytes
        else:
            jobs.append(dist.P2POp(dist.irecv, tables[unit, kind].part(move.piece), move.src))
    if jobs:
        for work in dist.batch_isend_irecv(jobs):
            work.wait()


def _place(values: Tensor, start: int, piece: Piece, into: Tensor) -> None:
    """Copy values, which begin at global entry `start`, to where the piece has them; what it lacks falls away."""
    low, high = max(start, piece.start), min(start + len(values), piece.stop)
    into[low - piece.start : high - piece.start] = values[low - start : high - start]
