"""Carry out a plan point to point: shards arrive, grow on arrival, and no rank ever holds a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabus.growth.plan import Buffer, Plan, RowRange, ScheduledTransfer, runs
from megabus.growth.rows import BLOCK_BYTES, drawn_rows, grow_rows
from megabus.parallel.fragments import MOMENTS, Fragments, Kind
from megabus.parallel.placement import Piece
from megabus.upload import upload


@dataclass
class Traffic:
    """Bytes that this rank really sent to others, and that it had already."""

    sent: int = 0
    kept: int = 0


@dataclass(frozen=True)
class OldRows:
    """Old rows that this rank needs, of one tensor: side by side in `values` (len(rows) * width,), of which only what
    is needed is ever written."""

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
        return values[upload(at, values.device)]


Arrivals = dict[tuple[RowRange, Kind], OldRows]
"""Where a wave's old rows arrive."""
Tensors = Mapping[str, tuple[Piece, dict[Kind, Tensor]]]
"""Fragments by the parameter's name."""


def redistribute(
    plan: Plan, owned: Fragments, kinds: tuple[Kind, ...], rank: int, buffer_bytes: int
) -> tuple[Fragments, Traffic]:
    """This rank's fragments under the new placement, grown from everybody's old ones. Collective.

    owned: this rank's fragments under the old placement. kinds: which tensors are sent and grown. buffer_bytes: the
    most memory to take beside `owned` and what is returned, as long as it holds two rows and what growing or drawing
    one takes (`rows.row_bytes`, `rows.drawn_row_bytes`).
    """
    device = next(iter(owned.values()))["weight"].device
    grown: Fragments = {  # zeros: what is 0 is not computed either
        piece: {kind: torch.zeros(len(piece), device=device) for kind in kinds} for piece in plan.new.owned(rank)
    }
    traffic = Traffic()
    old = {piece.name: (piece, tensors) for piece, tensors in owned.items()}
    new = {piece.name: (piece, tensors) for piece, tensors in grown.items()}
    buffer = Buffer.of(buffer_bytes)
    # A GPU likes its blocks as large as can be.
    limit = min(buffer.growing, BLOCK_BYTES) if device.type == "cpu" else buffer.growing
    for wave in plan.schedule(rank, buffer.old_rows, kinds):
        arrivals = _empty_rows(plan, wave.ranges, kinds, new, device)
        _exchange(wave.transfers, old, arrivals, rank, traffic)
        while arrivals:
            _grow_children(plan, *arrivals.popitem(), new, limit)
    _draw(plan, new, limit)
    return grown, traffic


def _children(plan: Plan, rows: RowRange, new: Tensors) -> list[tuple[Piece, dict[Kind, Tensor]]]:
    """This rank's part of the new parameters that grow from a row range."""
    return [new[name] for name in plan.children[rows.name] if name in new]


def _empty_rows(
    plan: Plan, ranges: list[RowRange], kinds: tuple[Kind, ...], new: Tensors, device: torch.device
) -> Arrivals:
    arrivals: Arrivals = {}
    for rows, kind in product(ranges, kinds):
        needed = plan.required(rows, [piece for piece, _ in _children(plan, rows, new)], kind).rows
        if len(needed):
            values = torch.empty(len(needed) * plan.old.width(rows.name), device=device)
            arrivals[rows, kind] = OldRows(needed, values)
    return arrivals


def _grow_children(plan: Plan, what: tuple[RowRange, Kind], old_rows: OldRows, new: Tensors, limit: int) -> None:
    """Turn the old rows of a range into all new rows that this rank owns of it."""
    rows, kind = what
    for piece, tensors in _children(plan, rows, new):
        param = plan.growth.param(piece.name)
        for low, high in runs(plan.child_rows(rows, piece)):
            for first, block in grow_rows(param, kind, low, high, old_rows.fetch, limit):
                _place(block.view(-1), first * param.width, piece, tensors[kind])


def _draw(plan: Plan, new: Tensors, limit: int) -> None:
    """This rank's weights of what grows from nothing, and with them its running means."""
    growth = plan.growth
    for name, (piece, tensors) in new.items():
        if growth.source(name) is None:
            width, drawn = plan.new.width(name), [tensors[kind] for kind in tensors if kind not in MOMENTS]
            low, high = piece.start // width, -(-piece.stop // width)
            for first, block in drawn_rows(growth.new, name, growth.seed, low, high, drawn[0].device, limit):
                for into in drawn:
                    _place(block.view(-1), first * width, piece, into)


def _exchange(
    transfers: list[ScheduledTransfer], old: Tensors, arrivals: Arrivals, rank: int, traffic: Traffic
) -> None:
    """Fill the arrivals with what this rank has and what others send. Straight from masters into old rows: no copies
    are made to be sent. Between two ranks messages go in the order of transfers."""
    jobs = []
    for rows, kind, transfer in transfers:
        if transfer.src == rank:
            whole, tensors = old[rows.name]
            entries = tensors[kind][transfer.piece.start - whole.start : transfer.piece.stop - whole.start]
        if transfer.src == transfer.dst:
            arrivals[rows, kind].part(transfer.piece).copy_(entries)
            traffic.kept += entries.nbytes
        elif transfer.src == rank:
            jobs.append(dist.P2POp(dist.isend, entries, transfer.dst))
            traffic.sent += entries.nbytes
        else:
            jobs.append(dist.P2POp(dist.irecv, arrivals[rows, kind].part(transfer.piece), transfer.src))
    if jobs:
        for work in dist.batch_isend_irecv(jobs):
            work.wait()


def _place(values: Tensor, start: int, piece: Piece, into: Tensor) -> None:
    """Copy values, which begin at global entry `start`, to where the piece has them; what it lacks falls away."""
    low, high = max(start, piece.start), min(start + len(values), piece.stop)
    into[low - piece.start : high - piece.start] = values[low - start : high - start]
