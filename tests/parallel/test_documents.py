"""Documents of packed sequences, kept apart in every layout, are the same documents computed alone."""

from __future__ import annotations

import functools

import pytest

from megabus.config import Layout
from megabus.engine.engine import PipelineLayers
from megabus.testing import parity

LIMIT = 1e-5
STEPS = 3  # from the second on, what the first has left counts; `make parity` takes five


def training(kind, layout, **train):
    return parity.parity_training(kind, layout, seq_len=12, **train)  # which tp divides


@functools.cache
def alone(kind):
    """Made from lively gains in every test: nGPT's attention sees positions, not only their differences, by s_qk."""
    return parity.plain_trace(training(kind, Layout(1, 1, 1)), packed=True, steps=STEPS)


@pytest.mark.usefixtures("lively_gains")
@pytest.mark.parametrize(
    ("kind", "layout", "train"),
    [
        ("ngpt", Layout(1, 1, 1), {}),
        ("ngpt", Layout(1, 1, 2), {"zero_stage": 2}),
        ("gpt", Layout(2, 1, 1), {"sequence_parallel": True, "micro_batch_size": 8}),
        ("gpt", Layout(1, 2, 2), {}),
        ("ngpt", Layout(1, 4, 1), {"micro_batch_size": 4}),
        ("ngpt", Layout(2, 2, 1), {"sequence_parallel": True, "recompute": True, "micro_batch_size": 8}),
    ],
    ids=str,
)
def test_layout_equals_documents_computed_alone(kind, layout, train):
    trace = parity.engine_trace(training(kind, layout, **train), packed=True, steps=STEPS)
    difference = parity.difference(trace, alone(kind))
    assert difference.worst <= LIMIT
    assert difference.masters <= 1e-4
    assert trace.replica_error == 0
    assert trace.unit_error <= 1e-6


@pytest.mark.usefixtures("lively_gains")
def test_negative_controls(monkeypatch):
    """Attention across documents, and a pipeline rank that takes the documents of another micro batch, are seen."""
    one = training("ngpt", Layout(1, 1, 1))
    assert parity.difference(parity.engine_trace(one, steps=STEPS), alone("ngpt")).logits > 1e-2
    four = training("ngpt", Layout(1, 4, 1), micro_batch_size=4)
    monkeypatch.setattr(PipelineLayers, "forward", _takes_the_first)
    assert parity.difference(parity.engine_trace(four, packed=True, steps=STEPS), alone("ngpt")).logits > 1e-2


def _takes_the_first(self, x, cache=None, documents=None):
    self.first = getattr(self, "first", None) or next(self.coming)
    return self.hidden(x, cache, self.first)
