"""What a micro batch takes: of a model that is run as of shapes, and on a GPU by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from megabus.config import ModelConfig
from megabus.estimate import activations
from megabus.estimate.activations import Shape


def test_larger_micro_batches_follow_from_two():
    model = ModelConfig(vocab_size=67, d_model=36, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=62)
    shape = Shape(model, 2, 1, 5, 22, "bf16", False, True, "eager", False)
    assert activations._run(shape, False) == activations._trace(shape, False)


@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("cut", [{}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}], ids=str)
def test_a_small_model_that_is_run_counts_as_shapes_do(kind, precision, cut, monkeypatch):
    model = ModelConfig(kind=kind, vocab_size=68, d_model=36, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, d_ff=62)
    plain = {"tp": 1, "sequence_parallel": False} | cut
    forms = [("eager", False), ("triton", True)]
    for recompute, last, (kernels, on_gpu) in itertools.product([False, True], [False, True], forms):
        sizes = plain | {"rank": 0, "batch": 3, "seq_len": 22, "precision": precision}
        shape = Shape(model, recompute=recompute, kernels=kernels, on_gpu=on_gpu, **sizes)
        monkeypatch.setattr(activations, "LITTLE", math.inf)
        run = activations._trace(shape, last)
        monkeypatch.setattr(activations, "LITTLE", 0)
        assert run == activations._trace(shape, last)


def test_what_only_a_gpu_allocates_is_counted():
    """By hand: a head whose rows no tensor core takes is copied; gradients of q, k and v are, to be multiplied at once,
    which spares sums of h's."""
    model = ModelConfig(vocab_size=50257, d_model=4096, n_layers=4, n_heads=32, head_dim=128, d_ff=14336)
    on_gpu = Shape(model, 1, 0, 4, 4096, "bf16", False, False, "triton", True)
    even = replace(on_gpu, model=model.model_copy(update={"vocab_size": 50264}))
    odd_head, even_head = (activations._trace(shape, True, 0).peak for shape in (on_gpu, even))
    assert odd_head - even_head == pytest.approx(2 * 50264 * 4096, rel=0.01)
    anywhere = replace(on_gpu, on_gpu=False)
    joint, apart = (activations._trace(shape, False).moved for shape in (on_gpu, anywhere))
    assert joint - apart == 2 * 4096 * 4 * (2 * 3 * 4096 - 3 * 3 * 4096)
    compiled = activations._trace(replace(on_gpu, kernels="compiled"), False).moved
    assert compiled - joint == 2 * 4096 * 4 * (2 * 2 * 14336)  # whose gate's gradients are two tensors
    head, eagers = (activations._trace(replace(on_gpu, kernels=kernels), True, 0) for kernels in ("compiled", "eager"))
    assert head == eagers
    assert activations._trace(on_gpu, True, 0).moved < head.moved / 2
