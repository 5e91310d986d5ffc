"""What must hold of a plan, whichever ranks are looked at: checked on the schedules that ranks act by, as intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from megabus.config.precision import FP32_BYTES
from megabus.config.stages import Layout
from megabus.growth.plan import Plan, RowRange, Transfer, Wave
from megabus.parallel.fragments import Kind
from megabus.parallel.placement import Piece
from megabus.parallel.topology import coordinate

Schedules = Mapping[int, Sequence[Wave]]
"""By rank, what it does (`Plan.schedule`)."""

BALANCE = 0.05  # of a rank's fair share: what it may take in above it, beside the families that its cuts divide
Message = tuple[Kind, Piece]


def faults(plan: Plan, schedules: Schedules, kinds: Sequence[Kind]) -> set[str]:
    """What is wrong with the schedules, in words; empty if nothing is.

    Of every rank in `schedules`: it gets each old entry that its new ones are made of, once (`missing`, `twice`,
    `needless`), from an owner (`not the owner's`), keeps what it has (`sent to its owner`), asks the replica of its
    own place in tensor parallelism (`another replica`), and takes in no more than its share (`unbalanced`). Between
    every two of them, what one sends in a wave is what the other awaits there, in the same order (`unpaired`).
    """
    found = {word for rank, waves in schedules.items() for word in _faults_of(plan, rank, waves, kinds)}
    if _messages(schedules, sent=True) != _messages(schedules, sent=False):
        found.add("unpaired")
    return found


def _faults_of(plan: Plan, rank: int, waves: Sequence[Wave], kinds: Sequence[Kind]) -> set[str]:
    found: set[str] = set()
    arrived: dict[tuple[str, Kind], list[Transfer]] = {}
    for wave in waves:
        for _, kind, transfer in wave.transfers:
            if transfer.dst == rank:
                arrived.setdefault((transfer.piece.name, kind), []).append(transfer)
                found |= _faults_of_transfer(plan, transfer)
            if transfer.src == rank and not _within(transfer.piece, plan.old.share(transfer.piece.name, rank)):
                found.add("not the owner's")
    needed: dict[tuple[str, Kind], list[tuple[int, int]]] = {}
    for name, pieces in plan.sources(rank).items():
        for kind in kinds:
            needed[name, kind] = plan.required(RowRange(name, 0, plan.old.rows(name)), pieces, kind).spans
    for what in needed.keys() | arrived.keys():
        spans = sorted((transfer.piece.start, transfer.piece.stop) for transfer in arrived.get(what, []))
        if any(start < stop for (_, stop), (start, _) in pairwise(spans)):
            found.add("twice")
        wanted = needed.get(what, [])
        if _length(_common(wanted, spans)) < _length(wanted):
            found.add("missing")
        if _length(_common(spans, wanted)) < _length(spans):
            found.add("needless")
    taken = FP32_BYTES * sum(len(transfer.piece) for transfers in arrived.values() for transfer in transfers)
    if taken > most_taken(plan, rank, len(kinds)):
        found.add("unbalanced")
    return found


def _faults_of_transfer(plan: Plan, transfer: Transfer) -> set[str]:
    found, name = set(), transfer.piece.name
    old = plan.old.layout
    if not _within(transfer.piece, plan.old.share(name, transfer.src)):
        found.add("not the owner's")
    own = plan.old.share(name, transfer.dst)
    if transfer.src != transfer.dst and max(own.start, transfer.piece.start) < min(own.stop, transfer.piece.stop):
        found.add("sent to its owner")
    if not plan.old.specs[name].sharded and coordinate(old, transfer.src).tp != coordinate(old, transfer.dst).tp:
        found.add("another replica")
    return found


def most_taken(plan: Plan, rank: int, tensors: int) -> float:
    """The most bytes of old entries that a rank may take in, received and kept, for so many tensors.

    Its fair share of an old parameter is the share that its piece has of the new one, and a piece may divide a family
    of copies at either end: a row, or under grouped queries a group of heads.
    """
    total = 0.0
    model = plan.growth.old
    group = model.n_heads // model.kv_heads * model.head_dim
    for name, pieces in plan.sources(rank).items():
        edge = 2 * ((group if plan.old.specs[name].rows == "heads" else 0) + 1) * plan.old.width(name)
        fair = sum(len(piece) * plan.old.numel(name) / plan.new.numel(piece.name) for piece in pieces)
        total += fair * (1 + BALANCE) + edge * len(pieces)
    return total * FP32_BYTES * tensors


@dataclass(frozen=True)
class Load:
    """Bytes a rank over the world, mean and most; spread: the largest most / mean among ranks of one role."""

    mean: float
    most: int
    spread: float


def loads(plan: Plan, schedules: Schedules) -> dict[str, Load]:
    """How evenly the work of a growth lies on the ranks, of which `schedules` has all.

    taken in: what a rank receives and keeps. A role is the place in the pipeline and in tensor parallelism, of the new
    layout; given out: what it sends and keeps, by the old layout. masters: what it owns when it is done.
    """
    taken, given = (dict.fromkeys(schedules, 0) for _ in range(2))
    for rank, waves in schedules.items():
        for wave in waves:
            for _, _, transfer in wave.transfers:
                taken[rank] += len(transfer.piece) * FP32_BYTES * (transfer.dst == rank)
                given[rank] += len(transfer.piece) * FP32_BYTES * (transfer.src == rank)
    owned = {rank: FP32_BYTES * sum(len(piece) for piece in plan.new.owned(rank)) for rank in schedules}
    return {
        "taken in": _load(taken, plan.new.layout),
        "given out": _load(given, plan.old.layout),
        "masters": _load(owned, plan.new.layout),
    }


def _load(counts: Mapping[int, int], layout: Layout) -> Load:
    roles: dict[tuple[int, int], list[int]] = {}
    for rank, count in counts.items():
        at = coordinate(layout, rank)
        roles.setdefault((at.pp, at.tp), []).append(count)
    spreads = [max(role) * len(role) / sum(role) for role in roles.values() if sum(role)]
    return Load(sum(counts.values()) / len(counts), max(counts.values()), max(spreads, default=1.0))


def _messages(schedules: Schedules, sent: bool) -> dict[tuple[int, int, int], list[Message]]:
    """By (wave, from, to) between ranks in `schedules`: what the one sends, or the other awaits."""
    found: dict[tuple[int, int, int], list[Message]] = {}
    for rank, waves in schedules.items():
        for number, wave in enumerate(waves):
            for _, kind, transfer in wave.transfers:
                here, there = (transfer.src, transfer.dst) if sent else (transfer.dst, transfer.src)
                if here == rank and there in schedules:
                    found.setdefault((number, transfer.src, transfer.dst), []).append((kind, transfer.piece))
    return found


def _within(piece: Piece, whole: Piece) -> bool:
    return whole.start <= piece.start and piece.stop <= whole.stop


def _length(spans: Sequence[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in spans)


def _common(spans: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of ascending `spans` that lie in `others`, ascending too; what overlaps there counts once."""
    found, at = [], 0
    for start, stop in spans:
        reached = start
        while at < len(others) and others[at][1] <= start:
            at += 1
        for low, high in others[at:]:
            if low >= stop:
                break
            low, high = max(low, reached), min(high, stop)
            if low < high:
                found.append((low, high))
                reached = high
    return found
