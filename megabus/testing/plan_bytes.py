"""The fewest bytes that a growth can move: what ZeRO's cuts leave no choice about, rank by rank.

A master has one owner: ZeRO-1 and 2 cut it over data parallelism, and the copies that ranks compute with are rounded to
bf16. So a rank must take in the old entries that its new ones are made of, and their owner must give them out, unless a
rank that has got them forwards them. Counted here from cuts and needs alone, without waves, messages or schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megabus.config.precision import FP32_BYTES
from megabus.growth.plan import Plan, RowRange
from megabus.parallel.fragments import Kind
from megabus.parallel.topology import coordinate


@dataclass(frozen=True)
class Least:
    """Bytes by rank: taken (received and kept), given (sent by owners, and kept), and which of either is kept.

    forwarding: no way of forwarding among ranks that need the same entries lets every rank send less than this.
    """

    taken: np.ndarray
    given: np.ndarray
    kept: np.ndarray
    forwarding: float


@dataclass(frozen=True)
class _Needs:
    """How many ranks need each entry of an old tensor, integrated: `wanted` and `again` (all but the first of them) in
    entries before each of the places `at`."""

    at: np.ndarray
    wanted: np.ndarray
    again: np.ndarray

    @classmethod
    def of(cls, spans: np.ndarray) -> _Needs:
        """spans: (n, 2), those of all ranks."""
        at, where = np.unique(spans, return_inverse=True)
        change = np.bincount(where.reshape(-1), np.tile([1, -1], len(spans)), len(at))
        count, length = np.cumsum(change)[:-1], np.diff(at)
        wanted, again = (np.concatenate([[0], np.cumsum(each * length)]) for each in (count, (count - 1).clip(0)))
        return cls(at, wanted, again)

    def within(self, values: np.ndarray, spans: np.ndarray) -> float:
        low, high = np.interp(spans, self.at, values).T
        return float(np.rint(high - low).sum())


def least(plan: Plan, kinds: Sequence[Kind]) -> Least:
    """Of a growth that takes these tensors along. Takes some 10 ms a rank of the world."""
    world = range(plan.old.layout.world)
    spans = {rank: _spans(plan, rank, kinds) for rank in world}
    served: dict[tuple[str, Kind, int], list[np.ndarray]] = {}
    for rank in world:
        for (name, kind), each in spans[rank].items():
            served.setdefault((name, kind, _replica(plan, name, rank)), []).append(each)
    needs = {what: _Needs.of(np.concatenate(each)) for what, each in served.items()}
    taken, given, kept, forwarded = np.zeros((4, len(world)))
    for rank in world:
        for (name, kind), each in spans[rank].items():
            need, own = needs[name, kind, _replica(plan, name, rank)], plan.old.share(name, rank)
            inside = each.clip(own.start, own.stop)
            taken[rank] += _length(each)
            kept[rank] += _length(inside)
            forwarded[rank] += need.within(need.again, each) - need.within(need.again, inside)
        for piece in plan.old.owned(rank):
            for kind in kinds:
                if (found := needs.get((piece.name, kind, _replica(plan, piece.name, rank)))) is not None:
                    given[rank] += found.within(found.wanted, np.array([[piece.start, piece.stop]]))
    sent = given - kept
    least_sent = _level(sent + forwarded, sent.sum())
    return Least(taken * FP32_BYTES, given * FP32_BYTES, kept * FP32_BYTES, least_sent * FP32_BYTES)


def _spans(plan: Plan, rank: int, kinds: Sequence[Kind]) -> dict[tuple[str, Kind], np.ndarray]:
    """The old entries that a rank needs, by tensor: disjoint spans (n, 2), n > 0."""
    found = {}
    for name, pieces in plan.sources(rank).items():
        for kind in kinds:
            if each := plan.required(RowRange(name, 0, plan.old.rows(name)), pieces, kind).spans:
                found[name, kind] = np.array(each)
    return found


def _replica(plan: Plan, name: str, rank: int) -> int:
    """Which of the copies that tensor parallelism makes of a parameter serves the rank, or is the rank's."""
    return 0 if plan.old.specs[name].sharded else coordinate(plan.old.layout, rank).tp


def _length(spans: np.ndarray) -> int:
    return int((spans[:, 1] - spans[:, 0]).sum())


def _level(most: np.ndarray, total: float) -> float:
    """The lowest level at which ranks that send no more than it, nor than `most` each, send `total` together."""
    most = np.sort(most)
    below = np.concatenate([[0], np.cumsum(most)[:-1]])  # what all lower ones send
    levels = (total - below) / np.arange(len(most), 0, -1)
    return float(levels[np.argmax(levels <= most)])
