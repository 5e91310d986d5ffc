"""One rank of a world of 1,024 without the others: what it builds and plans, and how little it looks at for that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megabus.config import load_config, resolve_stages
from megabus.growth.plan import Plan, plan_between, schedule_of
from megabus.parallel.placement import Piece, Placement
from megabus.testing.ranks import preload
from megabus.testing.simulate import build, fake_world, in_child, meta_stage, plan_growth_of

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


def _made(rank):
    """Groups that torch is asked for while a rank of the last stage builds its mesh, DeepSpeed's grid among it."""
    from megabus.parallel.mesh import Mesh

    new_group = torch.distributed.new_group
    with fake_world(1024, rank):
        torch.distributed.new_group = lambda *args, **options: made.append(args) or new_group(*args, **options)
        made: list[object] = []
        Mesh(STAGES[-1].layout, True).ends_group()
    return len(made)


def test_a_rank_makes_no_more_groups_in_a_large_world():
    """Of DeepSpeed's grid, which has the model of each dp rank and a group for each line along each axis: those that
    the rank is in. At pp 1 models are lines along tp, and lines along pp are single ranks."""
    built = on_fork(build, *((CONFIG, stage, 511) for stage in STAGES))
    assert [found.groups for found in built] == [3, 4, 4]
    assert on_fork(_made, (0,), (511,)) == [4 + 1, 4]  # the first rank of a pipeline meets the last one in another
    for stage, found in zip(STAGES, built, strict=True):
        assert found.masters * stage.layout.dp == pytest.approx(found.parameters, rel=1e-3)


@pytest.mark.parametrize("number", [0, 1])
def test_what_a_rank_sends_is_little_of_what_the_world_does(number):
    before, after = STAGES[number : number + 2]
    for planned in in_child(plan_growth_of, [(CONFIG, before, after, rank) for rank in RANKS]):
        share = planned.received + planned.kept
        assert 0 < share < 2 * 3 * 4 * 7.0e10 / 1024
        assert planned.receivers < 16
        assert planned.cost.mib < 300  # 17 where it was measured
        assert planned.sent_messages + planned.received_messages < 200


def looked_at(world, monkeypatch, everybody=False):
    """How many times the plan of a rank in the middle looks at what some rank needs of a parameter or row range."""
    count = [0]

    def counted(method):
        def call(*args):
            count[0] += 1
            return method(*args)

        return call

    before, after = resolve_stages(CONFIG, world)[:2]
    with monkeypatch.context() as patch:
        for name in ("required", "_parents"):
            patch.setattr(Plan, name, counted(getattr(Plan, name)))
        if everybody:
            patch.setattr(Plan, "receivers", lambda *_: range(world))
        schedule_of(CONFIG, plan_between(CONFIG, before, after), world // 2 - 1)
    return count[0]


def test_a_plan_looks_at_no_more_in_a_larger_world(monkeypatch):
    assert looked_at(1024, monkeypatch) <= looked_at(64, monkeypatch)
    assert looked_at(1024, monkeypatch) < 200 < 1024 < looked_at(1024, monkeypatch, everybody=True)
