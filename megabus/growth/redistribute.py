"""Carry out a plan point to point: shards arrive, grow on arrival, and no rank ever holds a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabus.growth.plan import Move, Plan, Unit, runs
from megabus.growth.rules import grow_rows
from megabus.parallel.fragments import Fragments, Kind
from megabus.parallel.placement import Piece


@dataclass
class Mail:
    """Bytes that this rank really sent to others, and that it had already."""

    sent: int = 0
    kept: int = 0


def redistribute(
    plan: Plan, owned: Fragments, kinds: tuple[Kind, ...], rank: int, buffer_bytes: int
) -> tuple[Fragments, Mail]:
    """This rank's fragments under the new placement, grown from everybody's old ones. Collective.

    owned: this rank's fragments under the old placement. kinds: which tensors go along.
    """
    device = next(iter(owned.values()))["weight"].device
    grown: Fragments = {
        piece: {kind: torch.empty(len(piece), device=device) for kind in kinds} for piece in plan.new.owned(rank)
    }
    mail = Mail()
    old = {piece.name: (piece, tensors) for piece, tensors in owned.items()}
    new = {piece.name: (piece, tensors) for piece, tensors in grown.items()}
    for wave in plan.waves(buffer_bytes, len(kinds)):
        moves = [(unit, list(plan.moves(unit, rank))) for unit in wave]
        arrived = _exchange([m for _, unit_moves in moves for m in unit_moves], old, kinds, rank, device, mail)
        for unit, unit_moves in moves:
            _grow_unit(plan, unit, [m for m in unit_moves if m.dst == rank], arrived, new, kinds, device)
    return grown, mail


def _exchange(
    moves: list[Move],
    old: Mapping[str, tuple[Piece, dict[Kind, Tensor]]],
    kinds: tuple[Kind, ...],
    rank: int,
    device: torch.device,
    mail: Mail,
) -> dict[Piece, dict[Kind, Tensor]]:
    """One message per pair of ranks. Returns what arrived, and views of what was here already."""

    def own(piece: Piece, kind: Kind) -> Tensor:
        whole, tensors = old[piece.name]
        return tensors[kind][piece.start - whole.start : piece.stop - whole.start]

    incoming: dict[int, list[Piece]] = {}
    outgoing: dict[int, list[Piece]] = {}
    arrived: dict[Piece, dict[Kind, Tensor]] = {}
    for move in moves:
        if move.src == move.dst == rank:
            arrived[move.piece] = {kind: own(move.piece, kind) for kind in kinds}
        elif move.dst == rank:
            incoming.setdefault(move.src, []).append(move.piece)
        elif move.src == rank:
            outgoing.setdefault(move.dst, []).append(move.piece)
    buffers = {src: torch.empty(sum(map(len, pieces)) * len(kinds), device=device) for src, pieces in incoming.items()}
    letters = {
        dst: torch.cat([own(piece, kind) for piece in pieces for kind in kinds]) for dst, pieces in outgoing.items()
    }
    jobs = [dist.P2POp(dist.irecv, buffer, src) for src, buffer in sorted(buffers.items())]
    jobs += [dist.P2POp(dist.isend, letter, dst) for dst, letter in sorted(letters.items())]
    if jobs:
        for work in dist.batch_isend_irecv(jobs):
            work.wait()
    mail.sent += sum(letter.nbytes for letter in letters.values())
    mail.kept += sum(tensor.nbytes for tensors in arrived.values() for tensor in tensors.values())
    for src, pieces in incoming.items():
        views = iter(buffers[src].split([len(piece) for piece in pieces for _ in kinds]))
        for piece in pieces:
            arrived[piece] = {kind: next(views) for kind in kinds}
    return arrived


def _grow_unit(
    plan: Plan,
    unit: Unit,
    moves: list[Move],
    arrived: Mapping[Piece, dict[Kind, Tensor]],
    new: Mapping[str, tuple[Piece, dict[Kind, Tensor]]],
    kinds: tuple[Kind, ...],
    device: torch.device,
) -> None:
    """Turn a unit's old rows into all new rows that this rank owns of it."""
    heirs = [new[name] for name in plan.heirs[unit.name] if name in new]
    if not moves:
        return
    needed = plan.needs(unit, [piece for piece, _ in heirs])
    width = plan.old.width(unit.name)
    is_matrix = plan.old.specs[unit.name].is_matrix
    for kind in kinds:
        table = torch.empty(len(needed) * width, device=device)
        for move in moves:  # each lies within one run of needed rows
            start = move.piece.start
            at = int(np.searchsorted(needed, start // width)) * width + start % width
            table[at : at + len(move.piece)] = arrived[move.piece][kind]
        table = table.view(len(needed), width) if is_matrix else table

        def fetch(parents: np.ndarray, table: Tensor = table) -> Tensor:
            return table[torch.from_numpy(np.searchsorted(needed, parents)).to(device)]

        for piece, tensors in heirs:
            for low, high in runs(plan.children(unit, piece)):
                rows = grow_rows(plan.growth, piece.name, kind, low, high, fetch).reshape(-1)
                _place(rows, low * plan.new.width(piece.name), piece, tensors[kind])


def _place(values: Tensor, start: int, piece: Piece, into: Tensor) -> None:
    """Copy values, which begin at global entry `start`, to where the piece has them; what it lacks falls away."""
    low, high = max(start, piece.start), min(start + len(values), piece.stop)
    into[low - piece.start : high - piece.start] = values[low - start : high - start]
