"""A larger learning rate for what a growth has added: which rows, by how much, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import megabus.train.run as run_room
from megabus.config import Layout, parse_config, resolve_stages
from megabus.config.after_growth import BoostConfig
from megabus.engine.engine import Engine
from megabus.engine.fragments import inner_optimizer
from megabus.errors import UserError
from megabus.growth.param_growth import Growth
from megabus.growth.transition import grow_engine
from megabus.model.decoder import param_specs
from megabus.parallel.placement import Placement
from megabus.testing import parity
from megabus.testing.ranks import run_ranks
from megabus.train.schedule import boost_factor
from tests.support.plans import row_parents
from tests.support.small_runs import after_step, rows_of, run_config, start, stop_after, write_corpus

SMALL = {"d_model": 35, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_ff": 62}
LARGE = {"d_model": 53, "n_layers": 5, "n_heads": 6, "d_ff": 102}  # ZeRO's partitions cut added rows
INSERTED = (3, 4)  # of the grown model's layers, which copy 0 1 2 0 1
FACTOR = 3.0
ONE = Layout(1, 1, 1)


def config_of(kind="gpt", layout=ONE, train=None, **optimizer):
    """A growth by odd fractions. A large eps: where a gradient is mere rounding, Adam would move by a whole lr."""
    degrees = {"tp": layout.tp, "pp": layout.pp}
    batch = {"seq_len": 16, "micro_batch_size": 6 // layout.dp, "global_batch_size": 12, "max_steps": 100}
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"vocab_size": 70, "head_dim": 6, "kind": kind} | SMALL,
            "layout": degrees,
            "train": batch | (train or {}),
            "optimizer": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1 if kind == "gpt" else 0.0} | optimizer,
            "growth": {"boost": {"factor": FACTOR, "tokens": 10_000}, "stages": [LARGE]},
            "data": {"train": "unused", "valid": "unused"},
        }
    )


def _job(config, factor, steps, fault):
    """Grow before the first step, then train: the masters of this rank's pieces at first and after every step, unit
    errors, and how many rows' parts it boosts."""
    if fault == "wrong rows":
        param = Growth.param
        Growth.param = lambda self, name: replace(grown := param(self, name), added=~grown.added)
    stages = resolve_stages(config, dist.get_world_size())
    engine = Engine(config.train, config.optimizer, stages[0])
    engine.write_initial(config.train.seed)
    engine = grow_engine(engine, config, stages[1]).engine
    if fault == "last hook":
        hooks = inner_optimizer(engine.deepspeed)._optimizer_step_post_hooks
        hooks.move_to_end(next(key for key, hook in hooks.items() if hook == engine.boost._stretch))

    def step(number):
        return engine.train_step(
            parity.rank_batches(engine, parity.batch_of(engine.stage, number)), config.optimizer.lr
        )

    seen, errors = [_masters(engine)], []
    engine.boost.factor = factor
    if fault == "skipped step":
        poison = next(engine.module.parameters()).register_hook(lambda grad: grad * torch.nan)
        assert not step(9).is_finite
        poison.remove()
    for number in range(steps):
        step(number)
        seen.append(_masters(engine))
        errors.append(engine.unit_error())
        assert not engine.boost._before
    cut = sum(len(rows.cut) for rows in engine.boost._rows)
    inner = inner_optimizer(engine.deepspeed)
    engine.close()
    assert not inner._optimizer_step_pre_hooks
    assert not inner._optimizer_step_post_hooks
    return seen, errors, cut


def _masters(engine):
    return {piece: tensors["weight"].clone() for piece, tensors in engine.read().items()}


def boosted(config, factor=FACTOR, steps=1, fault=None, layout=ONE):
    """Whole masters {name: (rows, width)} at first and after every step, with what `_job` tells beside them."""
    ranks = run_ranks(layout.world, _job, config, factor, steps, fault)
    model = resolve_stages(config, layout.world)[1].model
    placement, states = Placement(model, ONE), []
    for number in range(steps + 1):
        full = {name: torch.full((placement.numel(name),), torch.nan) for name in placement.specs}
        for seen, _, _ in ranks:
            for piece, values in seen[number].items():
                full[piece.name][piece.start : piece.stop] = values
        states.append({name: values.view(-1, placement.width(name)) for name, values in full.items()})
    return states, [errors for _, errors, _ in ranks], sum(cut for _, _, cut in ranks)


def added_rows(config):
    """Which rows growth adds, {name: (rows,)}; written without megabus's maps."""
    old, new = (stage.model for stage in resolve_stages(config, 1))
    growth, added = Growth(old, new, config.growth, 0), {}
    for name, spec in param_specs(new).items():
        parents = row_parents(growth, spec.rows)
        copies = [spec.rows != "embed" and parent in parents[:row] for row, parent in enumerate(parents)]
        added[name] = torch.tensor(copies) | (spec.layer in INSERTED)
    return added


def is_boosted(config, plain, states):
    """Whether after one step added rows have moved FACTOR times as far as without, and others to the same bit."""
    for name, rows in added_rows(config).items():
        at_first, without, with_it = (x[name] for x in (plain[0], plain[1], states[1]))
        moved, wanted = with_it[rows] - at_first[rows], FACTOR * (without[rows] - at_first[rows])
        if not torch.equal(with_it[~rows], without[~rows]) or not torch.allclose(moved, wanted, rtol=1e-4, atol=1e-6):
            return False
    return True


CASES = {
    "fp32": {},
    "zero2": {"train": {"zero_stage": 2}},
    "bf16": {"train": {"precision": "bf16"}},
    "bf16 zero2": {"train": {"precision": "bf16", "zero_stage": 2}},
    "deepspeed": {"implementation": "deepspeed"},
}


@pytest.mark.parametrize("case", CASES)
def test_added_rows_move_further_and_no_other(case, request):
    if case == "deepspeed":
        request.getfixturevalue("deepspeed_adam")
    config = config_of(**CASES[case])
    (plain, *_), (states, *_) = boosted(config, 1.0), boosted(config)
    assert is_boosted(config, plain, states)
    moved = [plain[1][name][rows] - plain[0][name][rows] for name, rows in added_rows(config).items()]
    assert sum(bool(rows.abs().sum() > 0) for rows in moved) > 10  # gates of inserted layers are 0: some stay


def test_negative_controls_of_the_rows():
    config = config_of()
    (plain, *_), (same, *_), (wrong, *_) = (
        boosted(config, 1.0),
        boosted(config, 1.0),
        boosted(config, 3.0, 1, "wrong rows"),
    )
    assert all(torch.equal(same[1][name], rows) for name, rows in plain[1].items())
    assert not is_boosted(config, plain, same)
    assert not is_boosted(config, plain, wrong)


def test_a_skipped_step_leaves_nothing_behind():
    config = config_of()
    (states, *_), (skipped, *_) = boosted(config, steps=2), boosted(config, steps=2, fault="skipped step")
    assert all(torch.equal(skipped[step][name], rows) for step in (1, 2) for name, rows in states[step].items())


LAYOUTS = [Layout(2, 1, 1), Layout(1, 2, 1), Layout(1, 1, 2), Layout(1, 1, 3), Layout(2, 1, 2)]


@pytest.fixture(scope="module")
def alone():
    return {kind: boosted(config_of(kind), steps=2)[0] for kind in ("ngpt", "gpt")}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_every_layout_boosts_alike(kind, layout, alone):
    """Two steps after a growth each master is a single process's, rows cut by ZeRO's partitions included."""
    states, _, cut = boosted(config_of(kind, layout), steps=2, layout=layout)
    assert (cut > 0) == (layout.dp > 1)
    for step in (0, 1, 2):
        gap = max(float((states[step][name] - rows).abs().max()) for name, rows in alone[kind][step].items())
        assert gap <= (1e-6 if step else 0)


@pytest.mark.parametrize("layout", [ONE, Layout(1, 1, 3)], ids=str)
def test_boosted_rows_are_unit(layout):
    _, errors, _ = boosted(config_of("ngpt", layout), steps=2, layout=layout)
    assert max(max(rank) for rank in errors) <= 1e-6
    _, errors, _ = boosted(config_of("ngpt", layout), steps=2, fault="last hook", layout=layout)
    assert max(max(rank) for rank in errors) > 1e-4  # negative control: normalised first, boosted afterwards


def test_it_falls_linearly_to_one():
    boost = BoostConfig(factor=3.0, tokens=200)
    assert [boost_factor(boost, tokens) for tokens in (0, 50, 100, 200, 1000)] == [3.0, 2.5, 2.0, 1.0, 1.0]
    assert boost_factor(BoostConfig(factor=0.5, tokens=200), 100) == 0.75
    assert boost_factor(None, 0) == 1.0


# ---- in a run: twelve steps, growing after steps 4 and 8 ---------------------------------------------------


STAGES = [
    {"d_model": 52, "n_heads": 4, "d_ff": 90, "max_tokens": 512},
    {"n_layers": 5, "seq_len": 32, "lr": 3e-3},
]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))

    def make(boost, changes=None, **checkpoint):
        growth = {"growth__max_tokens": 512, "growth__boost": boost, "growth__stages": STAGES}
        stages = [stage | {"layout": layout} for stage, layout in zip(STAGES, ({"dp": 2}, {"tp": 2}), strict=True)]
        growth["growth__stages"] = stages
        run = {"train__max_tokens": 1536, "eval__every": 6, "checkpoint": {"asynchronous": False} | checkpoint}
        changes = growth | run | (changes or {})
        return run_config(corpus, tmp_path_factory.mktemp("run") / "run", [{"dp": 2}] * 3, **changes)

    return make


BOOST = {"factor": 3.0, "tokens": 320}


@pytest.fixture(scope="module")
def whole(run_of):
    """The whole run at one go: its configuration, and what rank 0 saw."""
    config = run_of(BOOST)
    return config, start(config, 2)[0].steps


def repeats(steps, whole):
    return all(step in whole[1] for step in steps)


def test_a_run_boosts_after_each_growth(run_of, whole):
    """The factor at the middle of every step, in tokens since the growth, where it is not 1; none before the first."""
    config, steps = whole
    told = {row["step"]: row.get("boost") for row in rows_of(config, "step")}
    assert told == dict.fromkeys(range(1, 11), None) | {5: 2.6, 6: pytest.approx(1.8), 9: pytest.approx(2.2)}
    plain = start(run_of(None), 2, stop_after(5))[0].steps
    assert [step in steps for step in plain] == [True] * 4 + [False]


def test_a_run_settles_after_each_growth(run_of):
    """The bound on angles and the rewarmed rate at the middle of every step, in tokens since the growth."""
    settle = {"growth__settle": {"max_angle": 1e-3, "tokens": 320}, "growth__rewarm": {"share": 0.5, "tokens": 320}}
    config = run_of(None, settle)
    start(config, 2, stop_after(6))
    rows = {row["step"]: row for row in rows_of(config, "step")}
    told = {step: row.get("max_angle") for step, row in rows.items()}
    assert told == dict.fromkeys(range(1, 5), None) | {5: pytest.approx(1.25e-3), 6: pytest.approx(2.5e-3)}
    assert [rows[step]["lr"] for step in (4, 5, 6)] == pytest.approx([1e-2, 0.6e-2, 0.8e-2])


def test_resume_amid_a_boost_is_bitwise(run_of, whole):
    config = run_of(BOOST)
    for last, first in ((5, 1), (9, 6), (10, 10)):
        rank = start(config, 2, *([stop_after(last)] if last < 10 else []))[0]
        assert rank.numbers == list(range(first, last + 1))
        assert repeats(rank.steps, whole)


def _forget_rows():
    run_room._engine = lambda config, stages, found: Engine(config.train, config.optimizer, stages[found.state.stage])


def test_negative_control_a_resume_without_rows(run_of, whole):
    config = run_of(BOOST)
    start(config, 2, stop_after(5))
    rank = start(config, 2, _forget_rows, stop_after(6))[0]
    assert rank.numbers == [6]
    assert not repeats(rank.steps, whole)


def _back_once():
    """After step 6 a return to step 5's checkpoint; but no data are passed over, so that step 6 can be compared."""
    done = []

    def act(run):
        if not done:
            done.append(run.progress.position)
            run_room.roll_back(run)
            run.progress.position = done[0] - run.stage.tokens_per_step

    return after_step(6, act)


def test_a_rollback_amid_a_boost_repeats_it(run_of, whole):
    rank = start(run_of(BOOST, every=1), 2, _back_once(), stop_after(7))[0]
    assert rank.numbers == [1, 2, 3, 4, 5, 6, 6, 7]
    assert repeats(rank.steps, whole)


@pytest.mark.parametrize(
    ("boost", "key"),
    [
        ({"factor": 0}, "growth.boost.factor = 0: "),
        ({"factor": -1.0}, "growth.boost.factor = -1.0: "),
        ({"tokens": 0}, "growth.boost.tokens = 0: "),
        ({"tokens": 0.5}, "growth.boost.tokens = 0.5: "),
        ({"rows": 1}, "growth.boost.rows = 1: "),
        (2.0, "growth.boost = 2.0: "),
    ],
)
def test_wrong_values(run_of, boost, key):
    with pytest.raises(UserError) as caught:
        run_of(boost)
    assert str(caught.value).startswith(key)
