"""Gains' distributions: exact, the same under every layout, and told by a run."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megabus.config import Layout
from megabus.engine import gains
from megabus.engine.gains import PERCENTS, gain_percentiles, order_statistics
from megabus.model.decoder import param_specs
from megabus.parallel.placement import Placement
from megabus.testing.ranks import run_ranks
from tests.support.small_models import GQA, config, lively_state
from tests.support.small_runs import rows_of, run_config, start, write_corpus

CPU = torch.device("cpu")
LAYOUTS = [Layout(1, 1, 1), Layout(1, 3, 1), Layout(2, 1, 2), Layout(2, 2, 1)]


def expected(model, state):
    """With numpy, from whole tensors, and with declarations that are put together here."""
    found = {}
    for name, spec in param_specs(model).items():
        if spec.role == "gain":
            kind = name if spec.layer is None else name.removeprefix(f"layers.{spec.layer}.")
            found.setdefault(kind, []).append((spec.multiplier, state[name].numpy()))
    return {
        kind: {
            f"p{p}": parts[0][0] * float(np.percentile(np.concatenate([x for _, x in parts]), p, method="lower"))
            for p in PERCENTS
        }
        for kind, parts in found.items()
    }


def measure(layout, states, fault=None):
    """What a rank of that layout is told of each model, from its own pieces of the state."""
    rank, told = dist.get_rank(), []
    if fault is not None:
        fault()
    for model, state in states:
        placement = Placement(model, layout)
        fragments = {p: {"weight": state[p.name].reshape(-1)[p.start : p.stop]} for p in placement.owned(rank)}
        told.append(gain_percentiles(placement, fragments, rank, CPU))
    return told


@pytest.fixture(scope="module")
def states():
    models = [config(kind, GQA) for kind in ("ngpt", "gpt")]
    return [(model, lively_state(model)) for model in models]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_tells_the_whole_models_percentiles(states, layout):
    told = run_ranks(layout.world, measure, layout, states)
    want = [expected(*model) for model in states]
    assert want[0].keys() == {"s_qk", "s_u", "s_v", "alpha_attn", "alpha_mlp", "output.s_z"}
    assert want[1].keys() == {"norm_attn.gain", "norm_mlp.gain", "output.norm.gain"}
    assert told == [want] * layout.world  # to the bit


def count_replicas():
    gains.coordinate = lambda layout, rank: type("At", (), {"tp": 0})


def sum_nothing():
    gains.dist = type("NoDist", (), {**vars(dist), "all_reduce": staticmethod(lambda *a, **k: None)})


def test_negative_controls(states):
    layout = Layout(2, 1, 2)
    told = run_ranks(layout.world, measure, layout, states, count_replicas)
    assert all(answer[0] != expected(*states[0]) for answer in told)
    with pytest.raises(RuntimeError, match="out of bounds"):  # a rank that has seen its own part alone
        run_ranks(layout.world, measure, layout, states, sum_nothing)


def _statistics(whole):
    rank, world = dist.get_rank(), dist.get_world_size()
    return order_statistics([x[rank::world] for x in whole], [len(x) for x in whole])


def test_order_statistics_of_any_floats():
    draw = torch.Generator().manual_seed(0)
    specials = [0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0, 1.0, 1.0]
    lists = [
        torch.tensor(specials),
        torch.tensor([-2.5]),
        torch.tensor([7.0, -7.0]),
        torch.randn(1001, generator=draw) * 10 ** torch.randint(-30, 30, (1001,), generator=draw),
    ]
    for told in run_ranks(2, _statistics, lists):
        for found, whole in zip(told, lists, strict=True):
            ordered = sorted(whole.tolist())
            assert found == [ordered[p * (len(ordered) - 1) // 100] for p in PERCENTS]


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_a_value_that_is_none_comes_last(nan):
    (found,) = run_ranks(1, _statistics, [torch.tensor([nan, 2.0, 1.0])])[0]
    assert found[:-1] == [1.0] * 3 + [2.0] * 3
    assert math.isnan(found[-1])


def test_a_run_tells_gains_and_memory(tmp_path):
    """At every validation, under layouts that change with growth: in order, moving, and kept by growth."""
    corpus = write_corpus(tmp_path)
    layouts = [{"tp": 2}, {"pp": 2}, {"dp": 2}]
    run = run_config(corpus, tmp_path / "run", layouts, growth__write="tilt")
    start(run, 2)
    evals, told, memory = (rows_of(run, event) for event in ("eval", "gains", "memory"))
    assert [row["step"] for row in told] == [row["step"] for row in evals] == [row["step"] for row in memory]
    for row in told:
        kinds = {key: value for key, value in row.items() if isinstance(value, dict)}
        assert kinds.keys() == {"s_qk", "s_u", "s_v", "alpha_attn", "alpha_mlp", "output.s_z"}
        for values in kinds.values():
            assert all(low <= high for low, high in pairwise(values[f"p{p}"] for p in PERCENTS))
    first, last = told[0], told[-1]
    assert first["alpha_attn"]["p0"] == pytest.approx(0.05) == first["alpha_attn"]["p100"]  # effective, not raw
    assert first["s_v"]["p50"] == pytest.approx(6.0)  # 1 * sqrt(36)
    assert last["alpha_attn"] != first["alpha_attn"]
    # Growth keeps effective values: the last of a size are the first of the next (s_v carries sqrt(d_model)).
    (growth, *_) = rows_of(run, "growth")
    before, after = (row for row in told if row["step"] == growth["step"])
    assert after["alpha_mlp"]["p100"] == pytest.approx(before["alpha_mlp"]["p100"])
    wider = growth["new"]["d_model"] / growth["old"]["d_model"]  # and makes up for read rows that have turned
    assert wider > 1
    assert after["s_v"]["p100"] == pytest.approx(before["s_v"]["p100"] * wider**0.5)

    for row in memory:
        assert 2**20 < row["min_bytes"] <= row["mean_bytes"] <= row["max_bytes"]
        assert row["max_rank"] in (0, 1)
        assert row["of"] == "process"
    assert sorted(row["max_bytes"] for row in memory) == [row["max_bytes"] for row in memory]


def test_a_run_tells_what_it_runs_on(tmp_path):
    corpus = write_corpus(tmp_path)
    run = run_config(corpus, tmp_path / "run", [{"dp": 2}] * 3, train__max_tokens=256)
    start(run, 2)
    start(run, 2)  # a resume tells it again: it may be another machine
    (begun,), (resumed,) = rows_of(run, "start"), rows_of(run, "resume")
    for row in (begun, resumed):
        found = row["environment"]
        assert found["ranks"] == 2
        assert torch.__version__.startswith(found["torch"])  # a build's +cu130 is not in its package's version
        assert found["backend"] == "gloo"
        assert len(found["hosts"]) == len(found["devices"]) == 1
        assert found["memory_bytes"] > 2**28
