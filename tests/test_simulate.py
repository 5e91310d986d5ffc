"""One rank of a world of 1,024 without the others: what it builds and plans, and how little it looks at for that."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megabus.config import load_config, resolve_stages
from megabus.growth.plan import Plan
from megabus.parallel.placement import Piece, Placement
from megabus.testing.ranks import preload
from megabus.testing.simulate import (
    build,
    fake_world,
    in_child,
    meta_stage,
    plan_between,
    plan_growth_of,
    schedule,
)

torch.set_num_threads(1)
CONFIG = load_config(Path(__file__).parents[1] / "configs/ngpt_70b.yaml", [])
STAGES = resolve_stages(CONFIG, 1024)
RANKS = [0, 511, 1023]


def on_fork(job, *arguments):
    preload()
    return in_child(job, list(arguments))


def _on_meta(rank, fault):
    """(whether all parameters are on the meta device, the layers' numbers) of the last stage's layers."""
    from megabus.parallel.mesh import Mesh

    if fault:
        shard = Placement.shard
        Placement.shard = lambda *args: Piece("", 1, len(shard(*args)))
    with fake_world(1024, rank):
        decoder = meta_stage(CONFIG, STAGES[-1], Mesh(STAGES[-1].layout, True))
    return all(parameter.is_meta for parameter in decoder.parameters()), [int(name) for name in decoder.layers]


def test_layers_of_any_rank_take_no_storage():
    stages = on_fork(_on_meta, *((rank, False) for rank in RANKS))
    assert stages == [(True, list(range(first, first + 20))) for first in (0, 20, 60)]


def test_shards_that_differ_from_the_placement_are_noticed():
    with pytest.raises(RuntimeError, match="builds other shards than its placement says"):
        on_fork(_on_meta, (0, True))


def test_a_rank_joins_four_groups_of_the_hundreds_that_it_is_asked_for():
    """As many as DeepSpeed's grid has: dp of the other two axes, and one for each line along each axis."""
    built = on_fork(build, *((CONFIG, stage, 511) for stage in STAGES))
    for stage, found in zip(STAGES, built, strict=True):
        tp, pp, dp = stage.layout.tp, stage.layout.pp, stage.layout.dp
        lines = {tp * pp: dp, tp * dp: pp, pp * dp: tp}
        single = sum(length == 1 for length in lines.values())  # every rank's own group, asked for once
        groups = sum(count for count, length in lines.items() if length > 1) + (1024 if single else 0)
        assert found.groups_asked <= groups + dp
        assert found.groups_joined == 4 - (stage.layout.pp == 1)
        assert found.masters * dp == pytest.approx(found.parameters, rel=1e-3)


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_rank_sends_is_little_of_what_the_world_does(number):
    before, after = STAGES[number : number + 2]
    for planned in in_child(plan_growth_of, [(CONFIG, before, after, rank) for rank in RANKS]):
        share = planned.received + planned.kept
        assert 0 < share < 2 * 3 * 4 * 7.0e10 / 1024
        assert planned.correspondents < 16
        assert planned.sent_messages + planned.received_messages < 200


def looked_at(world, monkeypatch, everybody=False):
    """How many times the plan of a rank in the middle computes what somebody needs of a unit, growth by growth."""
    counts = []
    with monkeypatch.context() as patch:
        need = Plan.need
        patch.setattr(Plan, "need", lambda *args: counts.__setitem__(-1, counts[-1] + 1) or need(*args))
        if everybody:
            patch.setattr(Plan, "correspondents", lambda plan, _: range(world))
            patch.setattr(Plan, "_meets", lambda *_: True)
        for before, after in pairwise(resolve_stages(CONFIG, world)):
            counts.append(0)
            schedule(CONFIG, plan_between(CONFIG, before, after), world // 2 - 1)
    return counts


def test_a_plan_looks_at_no_more_in_a_larger_world(monkeypatch):
    small, large = looked_at(64, monkeypatch), looked_at(1024, monkeypatch)
    assert all(few <= many for few, many in zip(large, small, strict=True))
    assert max(large) < 100 < looked_at(64, monkeypatch, everybody=True)[0]
