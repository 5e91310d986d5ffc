"""Gradients that go straight to where Adam reads them are those that DeepSpeed's own way gives, bit for bit."""

from __future__ import annotations

import pytest
import torch

from megabus.config import Layout
from megabus.engine import engine as engine_room
from megabus.engine.engine import Engine
from megabus.engine.fragments import flat_partitions, inner_optimizer
from megabus.engine.gradients import FlatGradients
from megabus.model.params import spec_of
from megabus.testing import parity
from megabus.testing.ranks import run_ranks

TIED = {"tie_embeddings": True}
CASES = [
    ("ngpt", Layout(1, 1, 1), None, {}),
    ("ngpt", Layout(1, 1, 3), None, {"global_batch_size": 18}),  # ZeRO's partitions cut rows
    ("gpt", Layout(1, 1, 3), None, {"global_batch_size": 18, "zero_stage": 2}),
    ("ngpt", Layout(1, 1, 2), None, {"zero_stage": 2, "overlap_comm": True}),
    ("ngpt", Layout(2, 1, 2), None, {"micro_batch_size": 4}),
    ("gpt", Layout(1, 2, 1), TIED, {}),  # rows at both ends, whose gradients are added over these first
    ("gpt", Layout(1, 2, 2), TIED, {}),
]


def _trace(kind, layout, parts, train, steps=3):
    return parity.engine_trace(parity.parity_training(kind, layout, parts=parts, **train), steps=steps)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}-{case[3].get('zero_stage', 1)}")
def test_same_bits_as_deepspeed(case, monkeypatch):
    ours = _trace(*case)
    monkeypatch.setattr(engine_room, "flatten_gradients", lambda engine: None)
    theirs = _trace(*case)
    assert (ours.losses, ours.grad_norms) == (theirs.losses, theirs.grad_norms)
    for mine, other in ((ours.grads, theirs.grads), (ours.masters, theirs.masters)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)


def test_control_sums_that_forget_a_micro_batch_are_seen(monkeypatch):
    take = FlatGradients.take

    def forgets(self, parameter, group):
        self._untouched[group].add(self._optimizer.get_param_id(parameter))
        take(self, parameter, group)

    case = CASES[0]
    ours = _trace(*case, steps=1)
    monkeypatch.setattr(FlatGradients, "take", forgets)
    assert _trace(*case, steps=1).grad_norms != ours.grad_norms


def _without_one(training):
    """The largest gradient that Adam is given of one matrix: in a step of all, and in one in which it takes no part."""
    engine = Engine(training.train, training.optimizer, training.stage)
    engine.write_initial(0)
    place = next(x for x in engine.places if x.spec.is_matrix and not x.spec.lookup)
    found = []

    def look(optimizer, *_):
        for group in optimizer.param_groups:
            if flat_partitions(engine.deepspeed)[place.group] is group["params"][0]:
                found.append(float(group["params"][0].grad[place.part].abs().max()))

    inner_optimizer(engine.deepspeed).register_step_pre_hook(look)
    stage = engine.stage
    shape = (stage.grad_accum, stage.micro_batch_size, stage.seq_len)
    batches = [(micro, micro) for micro in torch.randint(stage.model.vocab_size, shape)]
    engine.train_step(batches, 1e-3)
    for parameter in engine.module.parameters():
        if spec_of(parameter).name == place.spec.name:
            parameter.requires_grad_(False)
    engine.train_step(batches, 1e-3)
    return found


def test_a_parameter_without_a_gradient_has_zeros():
    (found,) = run_ranks(1, _without_one, parity.parity_training("ngpt", Layout(1, 1, 1)))
    assert found[0] > 0
    assert found[1] == 0
