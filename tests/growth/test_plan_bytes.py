"""The fewest bytes that a growth can move, against needs counted entry by entry, and against schedules."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from megabus.config.precision import FP32_BYTES
from megabus.parallel.topology import coordinate
from megabus.testing.plan_bytes import _level, least
from megabus.testing.plan_check import loads
from tests.support.plans import SEEDS, needed_entries, owned_entries, random_pair

KINDS = ("weight", "exp_avg")


def by_entries(plan):
    """(taken, given, kept), bytes by rank: each old entry by itself, which its owner gives to all that need it."""
    world = range(plan.old.layout.world)
    owned = [owned_entries(plan.old, rank) for rank in world]
    needed = {(rank, kind): needed_entries(plan, rank, kind) for rank in world for kind in KINDS}
    found = np.zeros((3, len(world)), int)
    for (rank, _), entries in needed.items():
        found[0, rank] += len(entries)
        found[2, rank] += len(entries & owned[rank])
        for name, entry in entries:
            tp = coordinate(plan.old.layout, rank).tp
            replica = (
                src for src in world if plan.old.specs[name].sharded or coordinate(plan.old.layout, src).tp == tp
            )
            found[1, next(src for src in replica if (name, entry) in owned[src])] += 1
    return found * FP32_BYTES


@pytest.mark.parametrize("seed", SEEDS[:5])
def test_bounds_are_what_entries_say_and_schedules_meet_them(seed):
    plan = random_pair(seed)
    found = least(plan, KINDS)
    taken, given, kept = by_entries(plan)
    assert (found.taken == taken).all()
    assert (found.given == given).all()
    assert (found.kept == kept).all()
    schedules = {rank: plan.schedule(rank, 500, KINDS) for rank in range(len(taken))}
    load = loads(plan, schedules)
    assert load["taken in"].most == taken.max()
    assert load["given out"].most == given.max()
    sent = given - kept
    assert sent.mean() <= found.forwarding <= sent.max()
    assert found.forwarding == pytest.approx(forwarding_by_entries(plan, sent), rel=1e-9)


def forwarding_by_entries(plan, sent):
    """The level by bisection, from what each rank could forward: an entry that it has got and n need, n - 1 times."""
    world = range(len(sent))
    most = sent.astype(float)
    for kind in KINDS:
        needed = [needed_entries(plan, rank, kind) for rank in world]
        tp = [coordinate(plan.old.layout, rank).tp for rank in world]

        def served(name, rank, tp=tp):
            return 0 if plan.old.specs[name].sharded else tp[rank]

        count = Counter((entry, served(entry[0], rank)) for rank in world for entry in needed[rank])
        for rank in world:
            got = needed[rank] - owned_entries(plan.old, rank)
            most[rank] += FP32_BYTES * sum(count[entry, served(entry[0], rank)] - 1 for entry in got)
    low, high = 0.0, most.max()
    for _ in range(80):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(most, level).sum() < sent.sum() else (low, level)
    return high


def test_level():
    assert _level(np.array([3.0, 1.0, 8.0]), 9.0) == 5.0  # 3 and 1, which leaves 5
    assert _level(np.array([3.0, 1.0, 8.0]), 12.0) == 8.0
    assert _level(np.array([4.0, 4.0]), 6.0) == 3.0
