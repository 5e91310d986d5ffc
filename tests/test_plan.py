"""Plans as pure objects, over random layouts and sizes: moves, waves and traffic."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from plans import MODEL, SEEDS, grown_plan, random_pair

from megabus.config import GrowthConfig
from megabus.config.stages import Layout
from megabus.growth.plan import ELEMENT_BYTES, Move, Plan, Traffic, Unit, runs
from megabus.growth.rules import Growth
from megabus.parallel.placement import Piece, Placement

torch.set_num_threads(1)


def units(plan):
    return [Unit(name, 0, plan.old.rows(name)) for name in plan.old.specs]


def test_runs():
    assert runs(np.array([2, 3, 4, 7, 9, 10])) == [(2, 5), (7, 8), (9, 11)]
    assert runs(np.array([], int)) == []


def needed_entries(plan, rank):
    """Old entries that a rank's new rows copy, by brute force: whole rows, since whole rows are grown."""
    needed = set()
    for piece in plan.new.owned(rank):
        source = plan.growth.old_spec(plan.new.specs[piece.name]).name
        width, old_width = plan.new.width(piece.name), plan.old.width(source)
        for row in {i // width for i in range(piece.start, piece.stop)}:
            parent = int(plan.rows(piece.name).parent[row])
            needed |= {(source, parent * old_width + i) for i in range(old_width)}
    return needed


def owned_entries(placement, rank):
    return {(piece.name, i) for piece in placement.owned(rank) for i in range(piece.start, piece.stop)}


def faults(plan, moves):
    """What is wrong with a list of moves: a set of words, empty if they are a plan."""
    world = plan.old.layout.world
    owned = [owned_entries(plan.old, rank) for rank in range(world)]
    received = [Counter() for _ in range(world)]
    found = set()
    for move in moves:
        entries = {(move.piece.name, i) for i in range(move.piece.start, move.piece.stop)}
        if not entries <= owned[move.src]:
            found.add("not the owner's")
        if move.src != move.dst and entries & owned[move.dst]:
            found.add("sent to its owner")
        received[move.dst].update(entries)
    for rank in range(world):
        needed = needed_entries(plan, rank)
        if needed - received[rank].keys():
            found.add("missing")
        if received[rank].keys() - needed:
            found.add("needless")
        if any(count > 1 for count in received[rank].values()):
            found.add("twice")
    return found


def all_moves(plan):
    return [move for unit in units(plan) for move in plan.moves(unit)]


@pytest.mark.parametrize("seed", SEEDS)
def test_moves_bring_each_needed_entry_once_from_its_owner(seed):
    plan = random_pair(seed)
    assert faults(plan, all_moves(plan)) == set()


def changed(plan):
    moves = all_moves(plan)
    at, move = next((i, m) for i, m in enumerate(moves) if m.src != m.dst and len(m.piece) > 1)
    piece, rest = move.piece, moves[:at] + moves[at + 1 :]
    short = Piece(piece.name, piece.start, piece.stop - 1)
    liar = next(rank for rank in range(plan.old.layout.world) if rank not in (move.src, move.dst))
    return {
        "missing": [*rest, Move(move.src, move.dst, short)],
        "twice": [*moves, move],
        "not the owner's": [*rest, Move(liar, move.dst, piece)],
        "sent to its owner": [*moves, Move(move.dst, move.src, piece)],
        "needless": [*moves, *(Move(move.src, rank, piece) for rank in range(plan.old.layout.world))],
    }


@pytest.mark.parametrize("fault", ["missing", "twice", "not the owner's", "sent to its owner", "needless"])
def test_the_checks_of_moves_notice(fault):
    plan = grown_plan(Layout(1, 2, 2), Layout(2, 1, 2))
    assert faults(plan, all_moves(plan)) == set()
    assert fault in faults(plan, changed(plan)[fault])


@pytest.mark.parametrize("seed", SEEDS)
def test_every_rank_sees_its_part_of_the_same_moves(seed):
    """In the same order, so that messages need no labels; over units of a few rows too."""
    plan = random_pair(seed)
    for unit in itertools.chain(*plan.waves(500, 1)):
        whole = list(plan.moves(unit))
        for rank in range(plan.old.layout.world):
            assert list(plan.moves(unit, rank)) == [m for m in whole if rank in (m.src, m.dst)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_new_row_is_grown_from_one_unit(seed):
    """Children of all units are all rows of all pieces, once; and heirs are all new parameters, once."""
    plan = random_pair(seed)
    assert sorted(itertools.chain(*plan.heirs.values())) == sorted(plan.new.specs)
    split = list(itertools.chain(*plan.waves(300, 1)))
    for rank in range(plan.new.layout.world):
        for piece in plan.new.owned(rank):
            width = plan.new.width(piece.name)
            source = plan.growth.old_spec(plan.new.specs[piece.name]).name
            rows = [row for u in split if u.name == source for row in plan.children(u, piece).tolist()]
            assert rows == list(range(piece.start // width, -(-piece.stop // width)))


@pytest.mark.parametrize("tensors", [1, 3])
@pytest.mark.parametrize("budget", [1, 300, 4096, 2**28])
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_waves_cover_all_rows_once_and_fit_the_buffer(seed, budget, tensors):
    plan = random_pair(seed)
    waves = list(plan.waves(budget, tensors))
    rows = [(u.name, row) for wave in waves for u in wave for row in range(u.start, u.stop)]
    assert rows == [(name, row) for name in plan.old.specs for row in range(plan.old.rows(name))]

    def cost(wave):
        return sum((u.stop - u.start) * plan.old.width(u.name) for u in wave) * ELEMENT_BYTES * tensors

    for wave in waves:
        alone = len(wave) == 1 and wave[0].stop - wave[0].start == 1  # a row that no buffer could hold
        assert cost(wave) <= budget or alone
    for one, two in itertools.pairwise(waves):  # as few as can be, going in order
        assert cost(one) + cost(two[:1]) > budget
    assert (len(waves) == 1) == (budget == 2**28)


@pytest.mark.parametrize("seed", SEEDS)
def test_splitting_into_waves_changes_no_traffic(seed):
    plan = random_pair(seed)
    sent = kept = 0
    for unit in itertools.chain(*plan.waves(300, 1)):
        for move in plan.moves(unit):
            if move.src == move.dst:
                kept += len(move.piece)
            else:
                sent += len(move.piece)
    assert plan.traffic() == Traffic(sent * ELEMENT_BYTES, kept * ELEMENT_BYTES)


@pytest.mark.parametrize("seed", SEEDS)
def test_traffic_is_the_count_of_entries_that_change_owner(seed):
    plan = random_pair(seed)
    sent = kept = 0
    for rank in range(plan.old.layout.world):
        needed, owned = needed_entries(plan, rank), owned_entries(plan.old, rank)
        sent, kept = sent + len(needed - owned), kept + len(needed & owned)
    assert plan.traffic() == Traffic(sent * ELEMENT_BYTES, kept * ELEMENT_BYTES)


def still(model, layout):
    placement = Placement(model, layout)
    return Plan(placement, placement, Growth(model, model, GrowthConfig(), 0))


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 3, 1), Layout(2, 2, 1), Layout(1, 1, 1)], ids=str)
def test_nothing_is_sent_when_nothing_changes(layout):
    traffic = still(MODEL, layout).traffic()
    assert traffic.sent == 0
    assert traffic.kept == ELEMENT_BYTES * sum(
        len(p) for rank in range(layout.world) for p in Placement(MODEL, layout).owned(rank)
    )
    if layout.world > 1:
        other = Placement(MODEL, Layout(1, 1, layout.world))
        moved = Plan(Placement(MODEL, layout), other, Growth(MODEL, MODEL, GrowthConfig(), 0)).traffic()
        assert moved.sent > moved.kept / 10


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 3, 1)], ids=str)
def test_aligned_growth_needs_no_message(layout):
    """Where copies fall on their originals' rank (4 -> 8 heads, 3 -> 5 layers here), nobody sends."""
    assert grown_plan(layout, layout).traffic().sent == 0
    assert (grown_plan(layout, layout, depth="stack").traffic().sent > 0) == (layout.pp > 1)


@pytest.mark.parametrize("layout", [Layout(1, 1, 4), Layout(2, 1, 4), Layout(2, 3, 2)], ids=str)
def test_when_nothing_changes_only_rows_cut_by_zero_are_completed(layout):
    """A cut row goes whole to each rank that owns a part of it: at most two rows a data-parallel boundary."""
    plan = still(MODEL, layout)
    boundaries = (layout.dp - 1) * layout.pp * layout.tp
    assert 0 < plan.traffic().sent <= boundaries * MODEL.d_model * ELEMENT_BYTES
    for move in all_moves(plan):
        if move.src != move.dst:
            assert len(move.piece) < MODEL.d_model
