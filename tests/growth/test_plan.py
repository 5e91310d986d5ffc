"""Plans as pure objects, over random layouts and sizes: moves, waves and traffic."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from megabus.config import GrowthConfig
from megabus.config.precision import FP32_BYTES
from megabus.config.stages import Layout
from megabus.growth.param_growth import Growth
from megabus.growth.plan import Plan, RowRange, Transfer, runs
from megabus.parallel.placement import Piece, Placement
from tests.support.plans import MODEL, SEEDS, grown_plan, needed_entries, owned_entries, random_pair, traffic

torch.set_num_threads(1)


def world_of(plan):
    return range(plan.old.layout.world)


def test_runs():
    assert runs(np.array([2, 3, 4, 7, 9, 10])) == [(2, 5), (7, 8), (9, 11)]
    assert runs(np.array([], int)) == []


def faults(plan, moves, kind="weight"):
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
        needed = needed_entries(plan, rank, kind)
        if needed - received[rank].keys():
            found.add("missing")
        if received[rank].keys() - needed:
            found.add("needless")
        if any(count > 1 for count in received[rank].values()):
            found.add("twice")
    return found


def all_moves(plan, kind="weight"):
    units = [RowRange(name, 0, plan.old.rows(name)) for name in plan.old.specs]
    return [move for unit in units for rank in world_of(plan) for move in plan.transfers(rank, unit, kind)]


@pytest.mark.parametrize("kind", ["weight", "exp_avg"])
@pytest.mark.parametrize("seed", SEEDS)
def test_moves_bring_each_needed_entry_once_from_its_owner(seed, kind):
    plan = random_pair(seed)
    assert faults(plan, all_moves(plan, kind), kind) == set()


def changed(plan):
    moves = all_moves(plan)
    at, move = next((i, m) for i, m in enumerate(moves) if m.src != m.dst and len(m.piece) > 1)
    piece, rest = move.piece, moves[:at] + moves[at + 1 :]
    short = Piece(piece.name, piece.start, piece.stop - 1)
    liar = next(rank for rank in range(plan.old.layout.world) if rank not in (move.src, move.dst))
    return {
        "missing": [*rest, Transfer(move.src, move.dst, short)],
        "twice": [*moves, move],
        "not the owner's": [*rest, Transfer(liar, move.dst, piece)],
        "sent to its owner": [*moves, Transfer(move.dst, move.src, piece)],
        "needless": [*moves, *(Transfer(move.src, rank, piece) for rank in range(plan.old.layout.world))],
    }


@pytest.mark.parametrize("fault", ["missing", "twice", "not the owner's", "sent to its owner", "needless"])
def test_the_checks_of_moves_notice(fault):
    plan = grown_plan(Layout(1, 2, 2), Layout(2, 1, 2))
    assert faults(plan, all_moves(plan)) == set()
    assert fault in faults(plan, changed(plan)[fault])


def unpaired(schedules):
    """Pairs of ranks of which one does not send, in some wave, just what the other awaits there, in the same order: so
    messages need no labels, and no rank waits for one that waits for it."""
    found = set()
    for number, waves in enumerate(itertools.zip_longest(*schedules)):
        sent, awaited = {}, {}
        for rank, wave in enumerate(waves):
            for _, kind, move in wave.transfers if wave else []:
                if move.src == rank:
                    sent.setdefault((number, move.src, move.dst), []).append((kind, move.piece))
                if move.dst == rank:
                    awaited.setdefault((number, move.src, move.dst), []).append((kind, move.piece))
        found |= {key for key in sent.keys() | awaited.keys() if sent.get(key) != awaited.get(key)}
    return found


def schedules_of(plan, old_row_bytes, kinds=("weight",)):
    return [plan.schedule(rank, old_row_bytes, kinds) for rank in world_of(plan)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rank_sends_what_others_await_wave_by_wave(seed):
    plan = random_pair(seed)
    assert not unpaired(schedules_of(plan, 500, ("weight", "exp_avg")))


@pytest.mark.parametrize("fault", ["lost", "late", "out of order"])
def test_the_check_of_pairs_notices(fault):
    plan = grown_plan(Layout(1, 2, 2), Layout(2, 1, 2))
    schedules = schedules_of(plan, 500)
    assert not unpaired(schedules)
    number, wave = next((n, w) for n, w in enumerate(schedules[1]) if sum(m.src != m.dst for *_, m in w.transfers) > 1)
    at = [i for i, (*_, move) in enumerate(wave.transfers) if move.src != move.dst]
    if fault == "out of order":
        pairs = itertools.combinations(at, 2)
        ends = [(part[2].src, part[2].dst) for part in wave.transfers]
        i, j = next((i, j) for i, j in pairs if ends[i] == ends[j])
        wave.transfers[i], wave.transfers[j] = wave.transfers[j], wave.transfers[i]
    else:
        part = wave.transfers.pop(at[0])
        if fault == "late":
            schedules[1][number + 1].transfers.append(part)
    assert unpaired(schedules)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_new_row_is_grown_from_one_row_range(seed):
    """Children of a rank's row ranges are all rows of its pieces, once; and children are all new parameters, once."""
    plan = random_pair(seed)
    grown = [name for name in plan.new.specs if plan.growth.source(name) is not None]
    assert sorted(itertools.chain(*plan.children.values())) == sorted(grown)
    for rank in range(plan.new.layout.world):
        split = list(itertools.chain(*plan.waves(rank, 300, 1)))
        for piece in plan.new.owned(rank):
            width = plan.new.width(piece.name)
            source = plan.growth.source(piece.name)
            if source is None:
                continue
            rows = sorted(row for u in split if u.name == source for row in plan.child_rows(u, piece).tolist())
            assert rows == list(range(piece.start // width, -(-piece.stop // width)))


@pytest.mark.parametrize("tensors", [1, 3])
@pytest.mark.parametrize("budget", [1, 300, 4096, 2**28])
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_waves_bring_all_needed_rows_once_and_fit_the_buffer(seed, budget, tensors):
    plan = random_pair(seed)
    for rank in world_of(plan):
        needed = {(name, i // plan.old.width(name)) for name, i in needed_entries(plan, rank, None)}
        waves = [
            [(u.name, row) for u in wave for row in range(u.start, u.stop) if (u.name, row) in needed]
            for wave in plan.waves(rank, budget, tensors)
        ]
        assert Counter(itertools.chain(*waves)) == Counter(needed)
        sizes = [[plan.old.width(name) * FP32_BYTES * tensors for name, _ in wave] for wave in waves]
        for wave in sizes:
            assert sum(wave) <= budget or len(wave) == 1  # a row that no buffer could hold
        for wave, following in itertools.pairwise(sizes):
            assert sum(wave) + following[0] > budget  # none is opened before it must be
        assert len(waves) <= 1 or budget < 2**28


@pytest.mark.parametrize("seed", SEEDS)
def test_splitting_into_waves_changes_no_traffic(seed):
    plan = random_pair(seed)
    sent = kept = 0
    for rank, waves in enumerate(schedules_of(plan, 300)):
        for _, _, move in itertools.chain(*(wave.transfers for wave in waves)):
            if move.src == move.dst:
                kept += len(move.piece)
            elif move.dst == rank:
                sent += len(move.piece)
    assert traffic(plan) == (sent * FP32_BYTES, kept * FP32_BYTES)
    each = [traffic(plan, ranks=[rank]) for rank in world_of(plan)]
    assert traffic(plan) == tuple(map(sum, zip(*each, strict=True)))


@pytest.mark.parametrize("seed", SEEDS)
def test_traffic_is_the_count_of_entries_that_change_owner(seed):
    plan = random_pair(seed)
    sent = kept = 0
    for rank in range(plan.old.layout.world):
        needed, owned = needed_entries(plan, rank, "weight"), owned_entries(plan.old, rank)
        sent, kept = sent + len(needed - owned), kept + len(needed & owned)
    assert traffic(plan) == (sent * FP32_BYTES, kept * FP32_BYTES)


def still(model, layout):
    placement = Placement(model, layout)
    return Plan(placement, placement, Growth(model, model, GrowthConfig(), 0))


LAYOUTS = [(2, 1, 1), (1, 3, 1), (2, 2, 1), (1, 1, 1), (1, 1, 4), (2, 1, 4), (2, 3, 2)]


@pytest.mark.parametrize("layout", [Layout(*each) for each in LAYOUTS], ids=str)
def test_nothing_is_sent_when_nothing_changes(layout):
    sent, kept = traffic(still(MODEL, layout))
    assert sent == 0
    assert kept == FP32_BYTES * sum(
        len(p) for rank in range(layout.world) for p in Placement(MODEL, layout).owned(rank)
    )
    if layout.dp < layout.world:
        other = Placement(MODEL, Layout(1, 1, layout.world))
        sent, kept = traffic(Plan(Placement(MODEL, layout), other, Growth(MODEL, MODEL, GrowthConfig(), 0)))
        assert sent > kept / 10


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 3, 1)], ids=str)
def test_aligned_growth_needs_no_message(layout):
    """Where copies fall on their originals' rank (4 -> 8 heads, 3 -> 5 layers here), nobody sends."""
    for depth in ("identity", "split", "taper", "interleave"):
        assert traffic(grown_plan(layout, layout, depth=depth))[0] == 0
    for depth in ("append", "stack", "fresh"):  # what is new comes on top, and stages hold equally many
        assert (traffic(grown_plan(layout, layout, depth=depth))[0] > 0) == (layout.pp > 1)


def test_what_is_drawn_afresh_is_sent_by_nobody():
    """Each old entry is needed once, for the layer that it is in; under `stack` by other ranks, too."""
    deeper, before, after = MODEL.model_copy(update={"n_layers": 5}), Layout(1, 3, 1), Layout(1, 1, 3)
    bytes_of = {}
    for depth in ("fresh", "stack"):
        growth = Growth(MODEL, deeper, GrowthConfig(depth=depth), 5)
        bytes_of[depth] = sum(traffic(Plan(Placement(MODEL, before), Placement(deeper, after), growth)))
    placement = Placement(MODEL, before)
    assert bytes_of["fresh"] == FP32_BYTES * sum(map(placement.numel, placement.specs)) < bytes_of["stack"]
