"""Learning rates that differ along ZeRO's flat partitions: which entries, by how much, under every layout."""

from __future__ import annotations

import pytest
import torch

from megabus.config import Layout
from megabus.config.schema import OptimizerConfig
from megabus.engine import rates
from megabus.engine.adam import Segment, SegmentedAdamW, make_adam
from megabus.engine.fragments import inner_optimizer
from megabus.testing import parity
from megabus.testing.parity import parity_training
from megabus.testing.ranks import run_ranks

ONE = Layout(1, 1, 1)


def flat_and_gradients(n=1003, steps=3):
    draw = torch.Generator().manual_seed(0)
    return torch.randn(n, generator=draw), [torch.randn(n, generator=draw) for _ in range(steps)]


def stepped(adam, flat, gradients):
    for gradient in gradients:
        flat.grad = gradient.clone()
        adam.step()
    return flat.detach(), adam.state[flat]


def adam_of(flat, segments=None, **config):
    config = OptimizerConfig.model_validate({"lr": 3e-3} | config)
    adam = make_adam(config, [{"params": [flat], "weight_decay": config.weight_decay}], flat.device)
    if segments is not None:
        adam.param_groups[0]["segments"] = segments
    return adam


@pytest.mark.parametrize("segments", [None, [Segment(0, 1003, 1.0)]], ids=["none", "one"])
def test_one_rate_is_torchs_adam_to_the_bit(segments):
    start, gradients = flat_and_gradients()
    mine, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    weights, state = stepped(adam_of(mine, segments, weight_decay=0.1), mine, gradients)
    adam = torch.optim.AdamW([theirs], 3e-3, (0.9, 0.95), 1e-8, weight_decay=0.1, fused=True)
    wanted, state_wanted = stepped(adam, theirs, gradients)
    assert torch.equal(weights, wanted)
    assert all(torch.equal(state[key], state_wanted[key]) for key in state_wanted)


def test_each_segment_has_its_rate_and_all_the_same_decay():
    """Against torch's Adam in fp64 on each segment alone, with rate * lr and weight_decay / rate."""
    start, gradients = flat_and_gradients()
    flat = start.clone().requires_grad_()
    segments = [Segment(0, 1, 0.5), Segment(1, 332, 0.25), Segment(332, 1000, 1.0), Segment(1000, 1003, 0.25)]
    weights, state = stepped(adam_of(flat, segments, weight_decay=0.1), flat, gradients)
    for first, last, rate in segments:
        alone = start[first:last].double().requires_grad_()
        adam = torch.optim.AdamW([alone], rate * 3e-3, (0.9, 0.95), 1e-8, weight_decay=0.1 / rate)
        wanted, _ = stepped(adam, alone, [gradient[first:last].double() for gradient in gradients])
        torch.testing.assert_close(weights[first:last].double(), wanted, rtol=1e-6, atol=1e-7)
    assert float(state["step"]) == len(gradients)


def test_segments_are_joined_and_cover_the_padding():
    segments = [Segment(9, 12, 1.0), Segment(0, 5, 0.5), Segment(5, 9, 0.5), Segment(12, 15, 0.5)]
    assert rates.merged(segments, 17) == [(0, 9, 0.5), (9, 12, 1.0), (12, 17, 0.5)]
    assert rates.merged([Segment(0, 3, 1.0), Segment(3, 5, 1.0)], 6) == [(0, 6, 1.0)]


# ---- in an engine --------------------------------------------------------------------------------------------


def rate_of(spec):
    """Several in each group, neighbours alike and not."""
    return {"vocab": 0.5, "heads": 2.0, "kv_heads": 0.25}.get(spec.rows, 1.0) * (0.75 if spec.layer == 2 else 1.0)


def _job(training, fault):
    """One step: masters of this rank's pieces before and after it, and its segments."""
    from megabus.engine.engine import Engine

    engine = Engine(training.train, training.optimizer, training.stage)
    rate = {"none": lambda spec: 1.0, "swapped": lambda spec: 1 / rate_of(spec)}.get(fault, rate_of)
    rates.set_rates(engine.deepspeed, engine.places, rate)
    engine.write_initial(0)
    seen = []
    for step in range(2):
        seen.append({piece: tensors["weight"].clone() for piece, tensors in engine.read().items()})
        if step == 0:
            engine.train_step(parity.rank_batches(engine, parity.batch_of(engine.stage, 0)), training.optimizer.lr)
    specs = engine.placement.specs
    found = [(specs[piece.name], seen[0][piece], seen[1][piece]) for piece in seen[0]]
    inner = inner_optimizer(engine.deepspeed)
    assert isinstance(inner, SegmentedAdamW)
    counts = [len(group.get("segments", [])) for group in inner.param_groups]
    engine.close()
    return found, counts


def moved_as_asked(layout, fault=None, **train):
    """Whether every entry has moved by its rate times what the same step moves it by at one rate (gpt: no rows are
    normalised afterwards)."""
    training = parity_training("gpt", layout, **train)
    plain, ranks = (run_ranks(layout.world, _job, training, kind) for kind in ("none", fault))
    assert all(max(counts) == 1 for _, counts in plain)
    assert any(max(counts) > 1 for _, counts in ranks)
    close = True
    for (without, _), (with_it, _) in zip(plain, ranks, strict=True):
        for (spec, before, after), (_, _, other) in zip(with_it, without, strict=True):
            close &= torch.allclose(after - before, rate_of(spec) * (other - before), rtol=1e-3, atol=1e-6)
    return close


CASES = {
    "dp3": (Layout(1, 1, 3), {"global_batch_size": 18}),
    "zero2": (Layout(1, 1, 2), {"zero_stage": 2}),
    "bf16": (Layout(1, 1, 2), {"precision": "bf16"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_entry_moves_by_its_rate(case):
    layout, train = CASES[case]
    assert moved_as_asked(layout, **train)


def test_negative_control_of_the_rates():
    assert not moved_as_asked(ONE, "swapped")


# ---- a training with optimizer.transfer ----------------------------------------------------------------------

TRANSFER = {"ngpt": {"d_model": 5, "n_layers": 2, "steps": 9}, "gpt": {"d_model": 5}}
DP2 = Layout(1, 1, 2)  # it cuts within a segment
TP2 = Layout(2, 1, 1)
CASES_OF_LAYOUTS = [("ngpt", TP2), ("ngpt", Layout(1, 2, 1)), ("ngpt", DP2), ("gpt", DP2)]


@pytest.mark.parametrize(("kind", "layout"), CASES_OF_LAYOUTS, ids=str)
def test_every_layout_is_plain_pytorch(kind, layout):
    """torch's AdamW, with each parameter in a group of its own."""
    size = {"micro_batch_size": 8} if layout == TP2 else {}  # on CPUs each costs a hundred small collectives
    found = parity.engine_trace(parity_training(kind, layout, TRANSFER[kind], **size), steps=3)
    alone = parity.plain_trace(parity_training(kind, ONE, TRANSFER[kind]), steps=3)
    told = parity.difference(found, alone)
    assert max(told.worst, told.masters) <= 1e-5
    assert found.unit_error <= 1e-6
    if layout == DP2:  # control
        plain = parity.plain_trace(parity_training(kind, ONE), steps=3)
        assert parity.difference(plain, alone).masters > 1e-3
