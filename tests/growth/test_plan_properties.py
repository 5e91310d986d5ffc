"""Schedules of whole worlds over random sizes and layouts, and plans that are broken on purpose."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megabus.config import GrowthConfig, ModelConfig
from megabus.config.schema import Depth
from megabus.config.stages import Layout
from megabus.growth.param_growth import Growth
from megabus.growth.plan import Plan, RowRange, Transfer
from megabus.parallel.placement import Piece, Placement
from megabus.parallel.topology import coordinate
from megabus.testing.plan_check import faults, loads
from tests.support.plans import layouts, needed_entries, random_model

torch.set_num_threads(1)
KINDS = ("weight", "exp_avg")


@st.composite
def plans(draw):
    """A growth, or a change of layout alone, between random layouts of a world and random awkward sizes."""
    world = draw(st.integers(1, 12).filter(lambda n: layouts(n)))
    before, after = (draw(st.sampled_from(layouts(world))) for _ in range(2))
    chance = random.Random(draw(st.integers(0, 2**32)))
    old = random_model(chance, before)
    still = draw(st.booleans()) and old.n_heads % after.tp == old.kv_heads % after.tp == old.d_ff % after.tp == 0
    new = old if still and old.n_layers >= after.pp else random_model(chance, after, old)
    how = GrowthConfig(
        write=draw(st.sampled_from(["tilt", "clone"])),
        read=draw(st.sampled_from(["clone", "tilt"])),
        depth=draw(st.sampled_from(get_args(Depth))),
        channels=draw(st.sampled_from(["even", "uneven"])),
        moments=draw(st.sampled_from(["carry", "grow"])),
    )
    return Plan(Placement(old, before), Placement(new, after), Growth(old, new, how, 3))


def schedules_of(plan, old_row_bytes=500, kinds=KINDS):
    return {rank: plan.schedule(rank, old_row_bytes, kinds) for rank in range(plan.old.layout.world)}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(plans(), st.sampled_from([1, 300, 2**20]))
def test_what_all_ranks_plan_fits_together(plan, old_row_bytes):
    schedules = schedules_of(plan, old_row_bytes)
    assert faults(plan, schedules, KINDS) == set()
    for rank, waves in schedules.items():  # and against what a rank needs entry by entry, without megabus's maps
        for kind in KINDS:
            arrived = [
                (move.piece.name, i)
                for wave in waves
                for _, which, move in wave.transfers
                if which == kind and move.dst == rank
                for i in range(move.piece.start, move.piece.stop)
            ]
            assert len(arrived) == len(set(arrived))
            assert set(arrived) == needed_entries(plan, rank, kind)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(plans())
def test_receivers_are_all_to_whom_a_rank_sends(plan):
    world = range(plan.old.layout.world)
    served = {(unit.name, dst) for dst in world for wave in plan.waves(dst, 2**40, 1) for unit in wave}
    units = {name: RowRange(name, 0, plan.old.rows(name)) for name in plan.old.specs}
    moves = [move for name, dst in served for move in plan.transfers(dst, units[name])]
    for rank in world:
        assert {move.dst for move in moves if move.src == rank} - {rank} <= set(plan.receivers(rank))


# ---- broken plans

OLD = ModelConfig(vocab_size=66, d_model=36, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=64)
NEW = OLD.model_copy(update={"d_model": 52, "n_heads": 8, "n_kv_heads": 4, "d_ff": 96, "n_layers": 6})


def plan_of(before, after):
    return Plan(Placement(OLD, before), Placement(NEW, after), Growth(OLD, NEW, GrowthConfig(), 3))


def mutate(schedules, where, change):
    """Put `change(move)` in the place of the first move that `where` picks, on both of its ranks."""
    victim = next(m for waves in schedules.values() for w in waves for *_, m in w.transfers if where(m))
    for rank, waves in schedules.items():
        for number, wave in enumerate(waves):
            moves = []
            for unit, kind, move in wave.transfers:
                instead = change(move) if move == victim else [move]
                moves += [(unit, kind, m) for m in instead if rank in (m.src, m.dst)]
            waves[number] = replace(wave, transfers=moves)


def between(move):
    return move.src != move.dst and len(move.piece) > 1


def shorter(move):
    return [Transfer(move.src, move.dst, Piece(move.piece.name, move.piece.start, move.piece.stop - 1))]


def unneeded_by_its_owner(move):
    name = move.piece.name
    need = PLAN.required(RowRange(name, 0, PLAN.old.rows(name)), PLAN.sources(move.src).get(name, []), "weight")
    return all(stop <= move.piece.start or move.piece.stop <= start for start, stop in need.spans)


def from_another(move):
    return [Transfer((move.src + 1) % 4, move.dst, move.piece)]


PLAN = plan_of(Layout(1, 2, 2), Layout(2, 1, 2))
MUTATIONS = {
    "missing": (between, shorter),
    "twice": (between, lambda move: [move, move]),
    "not the owner's": (between, from_another),
    "sent to its owner": (lambda move: move.src == move.dst, from_another),
    "needless": (unneeded_by_its_owner, lambda move: [move, Transfer(move.src, move.src, move.piece)]),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_a_broken_move_is_noticed(fault):
    schedules = schedules_of(PLAN)
    assert faults(PLAN, schedules, KINDS) == set()
    mutate(schedules, *MUTATIONS[fault])
    assert fault in faults(PLAN, schedules, KINDS)


def test_a_message_that_is_awaited_and_not_sent_is_noticed():
    schedules = schedules_of(PLAN)
    sends = [(wave, part) for r in schedules for wave in schedules[r] for part in wave.transfers if part[2].src == r]
    wave, part = next((wave, part) for wave, part in sends if part[2].dst != part[2].src)
    wave.transfers.remove(part)
    assert faults(PLAN, schedules, KINDS) == {"unpaired"}


def test_one_replica_that_serves_all_is_noticed(monkeypatch):
    plan = plan_of(Layout(2, 1, 2), Layout(2, 2, 1))
    assert faults(plan, schedules_of(plan), KINDS) == set()
    owners = Placement.owners
    monkeypatch.setattr(Placement, "owners", lambda self, *args: owners(self, *args[:3], *(0 for _ in args[3:])))
    assert "another replica" in faults(plan, schedules_of(plan), KINDS)


# ---- balance


def test_taking_in_more_than_a_share_is_noticed():
    schedules = schedules_of(PLAN, 2**20)
    wave = schedules[0][0]
    whole = [Piece(name, 0, PLAN.old.numel(name)) for name in PLAN.old.specs]
    wave.transfers.extend((wave.ranges[0], "weight", Transfer(1, 0, piece)) for piece in whole)
    assert "unbalanced" in faults(PLAN, schedules, KINDS)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(plans())
def test_where_only_the_layout_changes_a_rank_takes_in_what_it_comes_to_own(plan):
    """So bytes are as even as ZeRO's partitions, which are equal to their padding."""
    still = Growth(plan.growth.old, plan.growth.old, plan.growth.how, 3)
    if plan.new.model != plan.old.model:
        plan = Plan(plan.old, plan.old, still)
    for rank, waves in schedules_of(plan, 500, ("weight",)).items():
        taken = sum(len(m.piece) for wave in waves for *_, m in wave.transfers if m.dst == rank)
        assert taken == sum(len(piece) for piece in plan.new.owned(rank))


def middle_spread(heads, d_ff, tp):
    """How uneven what the ranks of the middle stage of three take in is, for growth to so many heads and ffn units."""
    old = ModelConfig(vocab_size=64, d_model=64, n_layers=6, n_heads=8, head_dim=8, d_ff=256)
    new = old.model_copy(update={"d_model": 128, "n_heads": heads, "d_ff": d_ff})
    before, after = Layout(1, 1, 3 * 4 * tp), Layout(tp, 3, 4)
    plan = Plan(Placement(old, before), Placement(new, after), Growth(old, new, GrowthConfig(), 3))
    middle = [rank for rank in range(after.world) if coordinate(after, rank).pp == 1]
    schedules = {rank: plan.schedule(rank, 2**20, ("weight",)) for rank in middle}
    assert faults(plan, schedules, ("weight",)) == set()
    return loads(plan, schedules)["taken in"].spread


@pytest.mark.parametrize("tp", [1, 2])
def test_axes_that_grow_alike_leave_ranks_with_equal_bytes(tp):
    """Equal masters, made of the same share of old rows: within 5%. Where heads grow more than the rest, ranks whose
    partitions have more of them take in less: that is the cut's doing, and seen."""
    assert middle_spread(16, 512, tp) < 1.05 < middle_spread(32, 256, tp)
