"""Sequence parallelism, which cuts activations between tensor-parallel regions along T, is the same training."""

from __future__ import annotations

import functools
import re

import pytest
import torch.distributed as dist

from megabus.config import Layout, resolve_stages
from megabus.errors import UserError
from megabus.model.decoder import param_specs
from megabus.parallel.tensor_parallel import ProcessGroupTP
from megabus.testing import parity
from megabus.testing.ranks import run_ranks
from tests.support.trainings import run_of

LIMIT = 1e-5
STEPS = 3  # from the second on, what the first has left counts; `make parity` takes five
LAYOUTS = [Layout(2, 1, 1), Layout(2, 2, 1), Layout(2, 1, 2), Layout(4, 1, 1)]
SEQ_LEN = 12


@functools.cache
def reference(kind):
    return parity.plain_trace(parity.parity_training(kind, Layout(1, 1, 1), seq_len=SEQ_LEN), steps=STEPS)


def trace_of(kind, layout, **train):
    """Of steps of two micro batches, for on CPUs each costs a hundred small collectives."""
    train |= {"seq_len": SEQ_LEN, "micro_batch_size": 8 // layout.dp, "sequence_parallel": True}
    return parity.engine_trace(parity.parity_training(kind, layout, **train), steps=STEPS)


def assert_equals_one_process(trace, kind):
    difference = parity.difference(trace, reference(kind))
    assert difference.worst <= LIMIT
    assert difference.masters <= 1e-4
    assert trace.replica_error == 0
    assert trace.unit_error <= 1e-6


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_layout_equals_one_process(kind, layout):
    assert_equals_one_process(trace_of(kind, layout), kind)


@pytest.mark.parametrize(
    ("layout", "train"),
    [(Layout(2, 2, 1), {"recompute": True}), (Layout(2, 1, 2), {"zero_stage": 2})],
    ids=["recompute", "ZeRO-2"],
)
@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_recompute_and_zero_2_equal_one_process(kind, layout, train):
    assert_equals_one_process(trace_of(kind, layout, **train), kind)


def test_bf16_stays_near_and_replicas_equal():
    trace = trace_of("ngpt", Layout(2, 2, 1), precision="bf16")
    assert parity.difference(trace, reference("ngpt")).losses < 5e-3
    assert trace.unit_error <= 1e-6
    assert trace.replica_error == 0


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_negative_control_gains_that_are_not_summed(kind, monkeypatch):
    """Without the sum each rank keeps its own positions' part: seen in the gains of width d_model, and only there."""
    monkeypatch.setattr(ProcessGroupTP, "shared", lambda self, parameter: parameter)
    trace, right = trace_of(kind, Layout(2, 1, 1)), reference(kind)
    assert trace.replica_error > 0
    specs = param_specs(parity.parity_training(kind, Layout(2, 1, 1)).stage.model)
    for name, grad in right.grads.items():
        error = float((trace.grads[name] - grad).abs().max() / grad.abs().max())
        assert (error <= LIMIT) == specs[name].sharded, name
        assert specs[name].sharded or error > 1e-2, name
    assert parity.difference(trace, right).grad_norms > 1e-4


# ---- growth and other lengths


def growing(kind="ngpt", layouts=({"tp": 1}, {"tp": 1}), seq_lens=(8, 16), sequence_parallel=True):
    train = {"seq_len": seq_lens[0], "global_batch_size": 4, "sequence_parallel": sequence_parallel}
    first = parity.parity_training(kind, Layout(1, 1, 1), **train)
    larger = {"d_model": 52, "n_heads": 12, "d_ff": 88, "n_layers": 6, "seq_len": seq_lens[1], "layout": layouts[1]}
    return run_of(first, layout=layouts[0], growth={"stages": [larger]})


def _lengths_job(config):
    """Losses of a training with a growth in it, of training batches and of validations at three lengths."""
    from megabus.engine.engine import Engine
    from megabus.growth.transition import grow_engine

    stages = resolve_stages(config, dist.get_world_size())
    engine = Engine(config.train, config.optimizer, stages[0])
    engine.write_initial(config.train.seed)
    losses = []

    def batches(seq_len, step):
        tokens = [x.repeat(1, 2)[:, :seq_len].contiguous() for x in parity.batch_of(stages[0], step)]
        return parity.rank_batches(engine, (tokens[0], tokens[1]))

    def validate(seq_len):
        losses.append(engine.evaluate(batches(seq_len, 99), engine.stage.grad_accum, seq_len))

    for number, stage in enumerate(stages):
        if number:
            engine = grow_engine(engine, config, stage).engine
        validate(8)
        for step in range(2):
            losses.append(engine.train_step(batches(stage.seq_len, 2 * number + step), config.optimizer.lr).loss)
            validate(16 if step else 4)
    engine.close()
    return losses


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_growth_and_other_lengths_equal_one_process(kind):
    """Pipeline ranks send (B, T / tp, D): at the stage's own length, at another, and after a growth."""
    alone = run_ranks(1, _lengths_job, growing(kind, sequence_parallel=False))[0]
    for losses in run_ranks(4, _lengths_job, growing(kind, [{"tp": 2, "pp": 2}, {"tp": 4}])):
        assert losses == pytest.approx(alone, rel=0, abs=LIMIT)
    assert alone[4] == pytest.approx(alone[5], abs=1)  # the growth kept the function


# ---- configuration


def refusal(config, world):
    with pytest.raises(UserError) as caught:
        resolve_stages(config, world)
    return str(caught.value)


def test_lengths_that_tp_does_not_divide_are_refused():
    told = r"train.seq_len = 9: is not divisible by layout.tp = 2.*; choose a multiple of 2, or set.*=? to false"
    assert re.fullmatch(told, refusal(growing(layouts=[{"tp": 2}, {"tp": 2}], seq_lens=(9, 18)), 2))
    told = r"growth.stages.0.seq_len = 9: is not divisible by layout.tp = 2.*"
    assert re.fullmatch(told, refusal(growing(layouts=[{"tp": 1}, {"tp": 2}], seq_lens=(9, 9)), 2))
    told = r"growth.stages.0.layout.tp = 2: does not divide the seq_len before this growth, 9.*"
    assert re.fullmatch(told, refusal(growing(layouts=[{"tp": 1}, {"tp": 2}], seq_lens=(9, 18)), 2))


def test_without_tensor_parallelism_it_has_no_effect():
    config = growing(seq_lens=(9, 9))
    assert len(resolve_stages(config, 1)) == 2
    assert not ProcessGroupTP(None, 1, 0, sequence_parallel=True).sequence_parallel
    assert (
        len(resolve_stages(growing(layouts=[{"tp": 2}, {"tp": 2}], seq_lens=(9, 9), sequence_parallel=False), 2)) == 2
    )
