"""Growth of a running engine: shards grown in place equal the whole tensors grown in one process, bit for bit."""

from __future__ import annotations

import gc
import threading

import psutil
import pytest
import torch
import torch.distributed as dist

from megabus.config import Layout, parse_config, resolve_stages
from megabus.growth import redistribute as redistribute_module
from megabus.growth.param_growth import Growth
from megabus.growth.plan import Plan
from megabus.growth.state import grow_state
from megabus.parallel.fragments import KINDS
from megabus.parallel.placement import Placement
from megabus.testing import parity
from megabus.testing.ranks import run_ranks
from tests.support.plans import traffic

SMALL = {"d_model": 36, "n_layers": 3, "n_heads": 2, "d_ff": 62}
LARGE = {"d_model": 52, "n_layers": 5, "n_heads": 3, "d_ff": 90}


def growth_config(stages, layouts, kind="ngpt", first=SMALL, **growth):
    """A run of several stages; `layouts` has one more entry than `stages`. Micro batches are as large as they can be:
    tensor parallelism makes each of them a hundred small collectives, which on CPUs take most of the time."""
    base = {"vocab_size": 67, "head_dim": 6, "kind": kind} | first
    micro = 8 // max(2, *(layout.dp for layout in layouts))

    def layout(number):
        return {"tp": layouts[number].tp, "pp": layouts[number].pp}

    return parse_config(
        {
            "run_dir": "unused",
            "model": base,
            "layout": layout(0),
            "train": {"seq_len": 16, "micro_batch_size": micro, "global_batch_size": 8, "max_steps": 100},
            "optimizer": {"lr": 1e-2},
            "growth": growth | {"stages": [sizes | {"layout": layout(n)} for n, sizes in enumerate(stages, start=1)]},
            "data": {"train": "unused", "valid": "unused"},
        }
    )


def _pieces(engine):
    return {piece: {k: v.clone() for k, v in tensors.items()} for piece, tensors in engine.read().items()}


def _steps(engine, config, count, first=0):
    results = []
    for step in range(first, first + count):
        batches = parity.rank_batches(engine, parity.batch_of(engine.stage, step))
        results.append(engine.train_step(batches, config.optimizer.lr))
    return results


def _loss(engine):
    batches = parity.rank_batches(engine, parity.batch_of(engine.stage, 99))
    return engine.evaluate(batches, engine.stage.grad_accum, engine.stage.seq_len)


def _grow_job(config, steps_before, steps_after):
    from megabus.engine.engine import Engine
    from megabus.growth.transition import grow_engine

    stages = resolve_stages(config, dist.get_world_size())
    engine = Engine(config.train, config.optimizer, stages[0])
    engine.write_initial(config.train.seed)
    _steps(engine, config, steps_before)
    seen = []
    for number, stage in enumerate(stages[1:]):
        before, loss_before, step = _pieces(engine), _loss(engine), engine.optimizer_step
        transition = grow_engine(engine, config, stage)
        engine = transition.engine
        seen.append(
            {
                "before": before,
                "after": _pieces(engine),
                "losses": (loss_before, _loss(engine)),
                "steps": (step, engine.optimizer_step),
                "unit": engine.unit_error(),
                "sent": transition.sent,
                "kept": transition.kept,
            }
        )
        seen[-1]["training"] = _steps(engine, config, steps_after, first=10 * number)
        seen[-1]["unit_later"] = engine.unit_error()
    engine.close()
    return seen


def whole(ranks, key, model, kind="weight"):
    """Global tensors from every rank's pieces; every entry must have come from somewhere."""
    placement = Placement(model, Layout(1, 1, 1))
    full = {name: torch.full((placement.numel(name),), float("nan")) for name in placement.specs}
    for rank in ranks:
        for piece, tensors in rank[key].items():
            full[piece.name][piece.start : piece.stop] = tensors[kind]
    from megabus.model.params import global_shape

    return {name: full[name].view(global_shape(spec, model)) for name, spec in placement.specs.items()}


def grow_on_ranks(config, layouts, before=2, after=0):
    ranks = run_ranks(layouts[0].world, _grow_job, config, before, after)
    return [[rank[number] for rank in ranks] for number in range(len(layouts) - 1)]


MOVES = [
    ((1, 1, 1), (1, 1, 1)),
    ((2, 1, 1), (1, 2, 1)),
    ((1, 1, 2), (1, 2, 1)),
    ((2, 2, 1), (1, 2, 2)),
    ((1, 1, 4), (1, 4, 1)),
    ((1, 2, 2), (1, 1, 4)),
    ((2, 1, 2), (1, 2, 2)),
    ((1, 4, 1), (1, 1, 4)),
]


@pytest.mark.parametrize(("old", "new"), [(Layout(*a), Layout(*b)) for a, b in MOVES], ids=str)
@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_growing_shards_equals_growing_the_whole(old, new, kind):
    """Odd fractions in width and depth while the layout changes: the same bits as `grow_state`, the same loss."""
    if old.pp > SMALL["n_layers"]:
        old = Layout(1, 2, 2)
    config = growth_config([LARGE], [old, new], kind)
    stages = resolve_stages(config, old.world)
    (ranks,) = grow_on_ranks(config, [old, new])
    expected = grow_state(whole(ranks, "before", stages[0].model), stages[0].model, stages[1].model, config.train.seed)
    grown = whole(ranks, "after", stages[1].model)
    for name, tensor in expected.items():
        assert torch.equal(grown[name], tensor), name
    before, after = ranks[0]["losses"]
    assert abs(before - after) <= 1e-6
    if kind == "ngpt":
        assert max(rank["unit"] for rank in ranks) <= 1e-6


@pytest.mark.parametrize("moments", ["carry", "grow"])
@pytest.mark.parametrize("write", ["tilt", "clone"])
def test_moments_and_other_writes_grow_in_shards(moments, write):
    """Adam's moments are sent too, GQA groups grow, tp stays above 1: all bits as in one process."""
    layouts = [Layout(2, 2, 1), Layout(2, 1, 2)]
    first = SMALL | {"n_heads": 8, "n_kv_heads": 4}
    larger = LARGE | {"n_heads": 18, "n_kv_heads": 6}
    config = growth_config([larger], layouts, first=first, moments=moments, write=write, read="tilt", channels="uneven")
    old, new = (stage.model for stage in resolve_stages(config, 4))
    (ranks,) = grow_on_ranks(config, layouts, before=3, after=1)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        expected = grow_state(whole(ranks, "before", old, kind), old, new, config.train.seed, config.growth, kind)
        grown = whole(ranks, "after", new, kind)
        assert all(torch.equal(grown[name], tensor) for name, tensor in expected.items()), kind
    assert ranks[0]["steps"] == (3, 3)
    assert ranks[0]["unit_later"] <= 1e-6


@pytest.mark.parametrize(
    ("depth", "kind", "moments", "layouts"),
    [
        ("taper", "ngpt", "grow", [Layout(1, 2, 1), Layout(2, 1, 1)]),
        ("fresh", "ngpt", "grow", [Layout(2, 1, 1), Layout(1, 2, 1)]),
        ("fresh", "gpt", "carry", [Layout(1, 1, 2), Layout(2, 1, 1)]),
    ],
    ids=str,
)
def test_layers_that_are_not_silent_grow_in_shards(depth, kind, moments, layouts):
    config = growth_config([LARGE | {"n_heads": 4}], layouts, kind, depth=depth, moments=moments)
    old, new = (stage.model for stage in resolve_stages(config, layouts[0].world))
    (ranks,) = grow_on_ranks(config, layouts, before=2, after=1)
    for what in KINDS:
        expected = grow_state(whole(ranks, "before", old, what), old, new, config.train.seed, config.growth, what)
        grown = whole(ranks, "after", new, what)
        assert all(torch.equal(grown[name], tensor) for name, tensor in expected.items()), what
    before, after = ranks[0]["losses"]
    assert 1e-6 < abs(before - after) < 0.5
    assert kind == "gpt" or max(rank[when] for rank in ranks for when in ("unit", "unit_later")) <= 1e-6


def test_reset_moments_start_afresh():
    layouts = [Layout(1, 2, 1), Layout(1, 1, 2)]
    (ranks,) = grow_on_ranks(growth_config([LARGE], layouts, moments="reset"), layouts, before=3, after=1)
    assert ranks[0]["steps"] == (3, 0)
    assert all(set(tensors) == {"weight"} for rank in ranks for tensors in rank["after"].values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_relayout_without_growth_is_exact(precision):
    """There and back between three layouts with moments: not a bit changes."""
    layouts = [Layout(2, 2, 1), Layout(1, 1, 4), Layout(1, 2, 2), Layout(2, 2, 1)]
    config = growth_config([{}, {}, {}], layouts, moments="grow")
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    model = config.model
    moves = grow_on_ranks(config, layouts, before=2)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        first = whole(moves[0], "before", model, kind)
        for ranks in moves:
            for name, tensor in whole(ranks, "after", model, kind).items():
                assert torch.equal(tensor, first[name]), (kind, name)


def _straight_job(config):
    from megabus.engine.engine import Engine

    engine = Engine(config.train, config.optimizer, resolve_stages(config, dist.get_world_size())[0])
    engine.write_initial(config.train.seed)
    _steps(engine, config, 2)
    return _steps(engine, config, 2)


@pytest.mark.parametrize(("moments", "same"), [("grow", True), ("reset", False)])
def test_rebuilding_in_place_continues_bitwise(moments, same, monkeypatch):
    """With moments carried over, an engine rebuilt in the same layout trains on as if nothing had happened."""
    monkeypatch.setattr("megabus.config.stages._changes_nothing", lambda *_: False)  # a run is refused such a stage
    layouts = [Layout(2, 1, 2), Layout(2, 1, 2)]
    config = growth_config([{}], layouts, moments=moments)
    (ranks,) = grow_on_ranks(config, layouts, before=2, after=2)
    straight = run_ranks(4, _straight_job, config)
    assert (ranks[0]["training"] == straight[0]) == same


def test_bytes_sent_are_what_the_plan_says():
    """The ranks' own counts add up to the plan's, and a model that stays where it is sends nothing."""
    layouts = [Layout(2, 2, 1), Layout(1, 2, 2)]
    config = growth_config([LARGE], layouts)
    (ranks,) = grow_on_ranks(config, layouts)
    old, new = (stage.model for stage in resolve_stages(config, 4))
    plan = Plan(Placement(old, layouts[0]), Placement(new, layouts[1]), Growth(old, new, config.growth, 0))
    assert (ranks[0]["sent"], ranks[0]["kept"]) == traffic(plan, KINDS)
    assert min(traffic(plan, KINDS)) > 0
    same = Plan(Placement(old, Layout(2, 2, 1)), Placement(old, Layout(2, 2, 1)), Growth(old, old, config.growth, 0))
    assert traffic(same)[0] == 0


def _tiny_buffer_job(config):
    redistribute = redistribute_module.redistribute
    import megabus.growth.transition as transition

    transition.redistribute = lambda plan, owned, kinds, rank, _: redistribute(plan, owned, kinds, rank, 1000)
    return _grow_job(config, 2, 0)


def test_a_tiny_buffer_changes_no_bit():
    layouts = [Layout(2, 2, 1), Layout(1, 2, 2)]
    config = growth_config([LARGE], layouts)
    model = resolve_stages(config, 4)[1].model
    (ranks,) = grow_on_ranks(config, layouts)
    tiny = [rank[0] for rank in run_ranks(4, _tiny_buffer_job, config)]
    small = whole(tiny, "after", model)
    assert all(torch.equal(small[name], tensor) for name, tensor in whole(ranks, "after", model).items())


def _wrong_job(config):
    """A plan that takes parents one row too far."""
    import megabus.growth.param_growth as param_growth

    true_maps = param_growth.axis_maps

    def shifted(old, new):
        maps = true_maps(old, new)
        rows = maps["ffn"]
        parent = ((rows.parent + 1) % len(rows)).clip(max=rows.parent.max())
        return maps | {"ffn": param_growth.AxisMap(parent, rows.copy, rows.copies)}

    param_growth.axis_maps = shifted
    return _grow_job(config, 2, 0)


def test_negative_control_a_shifted_map_is_seen():
    layouts = [Layout(1, 1, 2), Layout(1, 1, 2)]
    config = growth_config([LARGE], layouts)
    (old, new), ranks = (
        (s.model for s in resolve_stages(config, 2)),
        [r[0] for r in run_ranks(2, _wrong_job, config)],
    )
    expected = grow_state(whole(ranks, "before", old), old, new, config.train.seed)
    grown = whole(ranks, "after", new)
    assert not all(torch.equal(grown[name], tensor) for name, tensor in expected.items())
    assert abs(ranks[0]["losses"][0] - ranks[0]["losses"][1]) > 1e-4


def _footprint():
    from deepspeed.runtime.engine import DeepSpeedEngine
    from torch.distributed.distributed_c10d import _world

    gc.collect()
    process = psutil.Process()
    return {
        "groups": len(_world.pg_map),
        "threads": process.num_threads(),
        "python_threads": threading.active_count(),
        "files": process.num_fds(),
        "memory": process.memory_info().rss,
        "objects": len(gc.get_objects()),
        "engines": sum(isinstance(thing, DeepSpeedEngine) for thing in gc.get_objects()),
    }


def _twelve_growths(config, fault=None):
    from megabus.engine.engine import Engine
    from megabus.growth.transition import grow_engine
    from megabus.parallel import mesh

    stages = resolve_stages(config, dist.get_world_size())
    engine = Engine(config.train, config.optimizer, stages[0])
    engine.write_initial(0)
    seen = []
    for number in range(12):
        if fault == "new groups":
            mesh.forget_process_groups()
        engine = grow_engine(engine, config, stages[number % 2]).engine
        _steps(engine, config, 1)
        if number in (3, 11):  # both layouts have been seen twice by then
            seen.append(_footprint())
    engine.close()
    return seen


@pytest.mark.parametrize(
    "layouts", [[Layout(2, 2, 1), Layout(1, 2, 2)], [Layout(2, 1, 2), Layout(1, 1, 4)]], ids=["pipeline", "plain"]
)
def test_twelve_growths_leak_nothing(layouts):
    """Two layouts in turn: from the second round on, no group, thread, file or object more; memory level."""
    for rank in run_ranks(4, _twelve_growths, growth_config([{}], layouts), timeout=300):
        for what in ("groups", "threads", "python_threads", "files"):
            assert rank[-1][what] <= rank[0][what], what
        # Objects, not bytes: what the allocator keeps depends on the machine.
        assert rank[-1]["engines"] == 1
        assert rank[-1]["objects"] - rank[0]["objects"] < 200
        assert rank[-1]["memory"] - rank[0]["memory"] < 8 * 2**20


def test_negative_control_groups_are_made_again_when_they_are_forgotten():
    """Torch takes no second one of the same members' name: what leaked without reuse ends at once."""
    layouts = [Layout(1, 2, 1), Layout(1, 1, 2)]
    with pytest.raises(RuntimeError, match="group name has already been created"):
        run_ranks(2, _twelve_growths, growth_config([{}], layouts), "new groups")
