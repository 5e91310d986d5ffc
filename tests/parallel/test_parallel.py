"""Every layout of 1, 2 and 4 ranks is the same training as plain PyTorch in one process."""

from __future__ import annotations

import copy
import functools
import math
import time

import pytest
import torch
import torch.distributed as dist

from megabus.config import Layout
from megabus.engine.engine import Engine
from megabus.kernels.adjacent import joined
from megabus.model import joint, layers, loss, ngpt
from megabus.model.params import spec_of
from megabus.parallel.tensor_parallel import ProcessGroupTP
from megabus.testing import parity
from megabus.testing.ranks import run_ranks

LIMIT = 1e-5
STEPS = 3  # from the second on, what the first has left counts; `make parity` takes five
PARTS = {
    "bias, tied": {"qkv_bias": True, "tie_embeddings": True},
    "norm, tied": {"qk_norm": True, "tie_embeddings": True},
}


@functools.cache
def reference(kind: str, parts: str = "", **train: object) -> parity.Trace:
    return parity.plain_trace(
        parity.parity_training(kind, Layout(1, 1, 1), parts=PARTS.get(parts), **train), steps=STEPS
    )


def trace_of(kind: str, layout: Layout, parts: str = "", **train: object) -> parity.Trace:
    """With tensor parallelism, of steps of two micro batches, of four where a pipeline has two ranks: on CPUs each
    costs a hundred small collectives."""
    if layout.tp > 1:
        train = {"micro_batch_size": 8 // layout.dp // layout.pp} | train
    return parity.engine_trace(parity.parity_training(kind, layout, parts=PARTS.get(parts), **train), steps=STEPS)


@functools.cache
def trace_of_defaults(kind: str, layout: Layout, precision: str = "fp32") -> parity.Trace:
    """Kept, for several tests look at it; none of those that patch the model or the engine."""
    return trace_of(kind, layout, precision=precision)


@pytest.mark.parametrize("layout", parity.LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["ngpt", "gpt"])
def test_layout_equals_one_process(kind, layout):
    trace = trace_of_defaults(kind, layout)
    assert parity.difference(trace, reference(kind)).worst <= LIMIT
    assert trace.replica_error == 0
    if kind == "ngpt":
        assert trace.unit_error <= 1e-6


@pytest.mark.parametrize(
    ("parts", "layout"),
    [("bias, tied", Layout(1, 2, 2)), ("bias, tied", Layout(2, 1, 1)), ("norm, tied", Layout(2, 2, 1))],
    ids=str,
)
def test_parts_of_stock_classes_equal_one_process(parts, layout):
    """Gradients of a tied matrix come from both ends of a pipeline, those of a head norm's gain from all heads."""
    trace = trace_of("gpt", layout, parts)
    assert parity.difference(trace, reference("gpt", parts)).worst <= LIMIT
    assert trace.replica_error == 0


def test_tied_heads_in_bf16_stay_near():
    """Gradients of borrowed rows add up over micro batches there too, in fp32."""
    one, two = (trace_of("gpt", Layout(1, pp, 1), "bias, tied", precision="bf16") for pp in (1, 2))
    assert parity.difference(two, one).grads < 5e-3


@pytest.mark.parametrize("overlap_comm", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("layout", [Layout(1, 1, 4), Layout(2, 1, 2)], ids=str)
def test_zero_2_equals_one_process(layout, overlap_comm):
    trace = trace_of("ngpt", layout, zero_stage=2, overlap_comm=overlap_comm)
    assert parity.difference(trace, reference("ngpt")).worst <= LIMIT


@pytest.mark.parametrize("layout", [Layout(2, 1, 1), Layout(1, 2, 1)], ids=str)
def test_recompute_equals_one_process(layout):
    assert parity.difference(trace_of("ngpt", layout, recompute=True), reference("ngpt")).worst <= LIMIT


def _joint_products(h, weights, biases=None):
    """Of matrices that must lie side by side, wherever DeepSpeed has laid them."""
    assert joined(weights, 0) is not None
    return joint.joint_products(h, weights, [bias for bias in biases or [] if bias is not None])


@pytest.mark.parametrize(
    ("kind", "parts", "layout", "train"),
    [("gpt", "bias, tied", Layout(1, 2, 2), {}), ("ngpt", "", Layout(2, 1, 2), {"zero_stage": 2})],
    ids=str,
)
def test_what_gpus_compute_equals_one_process(kind, parts, layout, train, monkeypatch):
    """Joint products, and a head whose odd shards of the vocabulary are filled up with zeros."""
    plain = reference(kind, parts)
    monkeypatch.setattr(layers, "products", _joint_products)
    monkeypatch.setattr(loss, "on_gpu", lambda x: True)
    assert parity.difference(trace_of(kind, layout, parts, **train), plain).worst <= LIMIT


@pytest.mark.parametrize("layout", [Layout(2, 2, 1), Layout(2, 1, 2)], ids=str)
def test_clipping_uses_the_global_norm(layout):
    """Clipped at a fifth of the norm: wrong norms of shards or replicas would scale the update."""
    clip = {"gradient_clipping": reference("ngpt").grad_norms[0] / 5}
    plain = reference("ngpt", **clip)
    trace = trace_of("ngpt", layout, **clip)
    difference = parity.difference(trace, plain)
    assert max(difference.losses, difference.grad_norms) <= LIMIT
    assert difference.masters <= 1e-4
    assert parity.difference(trace, reference("ngpt")).masters > 1e-4  # clipping did something


@pytest.mark.parametrize(
    ("layout", "zero"), [(Layout(2, 2, 1), 1), (Layout(1, 1, 4), 1), (Layout(2, 1, 2), 2)], ids=str
)
def test_bf16_stays_near_and_keeps_unit_masters(layout, zero):
    trace = trace_of("ngpt", layout, precision="bf16", zero_stage=zero)
    assert trace.unit_error <= 1e-6
    assert parity.difference(trace, reference("ngpt")).losses < 5e-3
    one = trace_of_defaults("ngpt", Layout(1, 1, 1), "bf16")
    assert parity.difference(trace, one).losses < 2e-3


def preconditioned_logits(self, h_BTD):
    """Logits of their true value with the derivative that `train.logit_power` 0.5 asks for."""
    u, gain = self.head(h_BTD), self.s_z * self.scale
    return gain * u.detach() + (gain / gain.mean()).sqrt().detach() * (u - u.detach())


@pytest.mark.usefixtures("lively_gains")
@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(2, 2, 1)], ids=str)
def test_preconditioned_logits_equal_one_process(layout, monkeypatch):
    """The mean gain is the whole vocabulary's, whatever shard a rank holds."""
    with monkeypatch.context() as patch:
        patch.setattr(ngpt.Output, "forward", preconditioned_logits)
        plain = reference.__wrapped__("ngpt")  # not kept: of another model
    trace = trace_of("ngpt", layout, logit_power=0.5)
    assert parity.difference(trace, plain).worst <= LIMIT
    if layout.world == 1:
        assert parity.difference(trace_of("ngpt", layout), plain).grads > 1e-2  # control: without it they differ
    if layout.tp > 1:  # control: each shard by its own mean
        monkeypatch.setattr(
            ProcessGroupTP, "sum", lambda self, x: x if x.numel() == 2 else self._reduce(x, dist.ReduceOp.SUM)
        )
        assert parity.difference(trace_of("ngpt", layout, logit_power=0.5), plain).grads > LIMIT


def _sums_job(config):
    """(dtypes of the large all-reduces of a step, bytes of gradients that are kept in bf16 until then, tensors that are
    broadcast while the engine is made)."""
    dtypes, kept, all_reduce, broadcast, sent = set(), [], dist.all_reduce, dist.broadcast, []
    dist.broadcast = lambda tensor, *args, **options: (sent.append(tensor), broadcast(tensor, *args, **options))[1]
    engine = Engine(config.train, config.optimizer, config.stage)
    engine.write_initial(0)

    def spy(tensor, *args, **options):
        if tensor.numel() > 1000:
            dtypes.add(tensor.dtype)
            kept.append(sum(p.grad.nbytes for p in engine.module.parameters() if p.grad is not None))
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = spy
    engine.train_step(parity.rank_batches(engine, parity.batch_of(config.stage, 0)), 1e-3)
    return dtypes, max(kept), len(sent)


@pytest.mark.parametrize(
    ("layout", "zero"), [(Layout(1, 1, 2), 1), (Layout(1, 2, 2), 1), (Layout(1, 1, 2), 2)], ids=str
)
def test_bf16_gradients_add_up_in_fp32(layout, zero):
    """Over micro batches and over ranks: DeepSpeed's own settings send and add them in bf16. It would also send the
    weights, before there are any."""
    config = parity.parity_training("ngpt", layout, precision="bf16", zero_stage=zero)
    for dtypes, kept, sent in run_ranks(layout.world, _sums_job, config):
        assert sent == (layout.pp > 1)  # by which a pipeline's ranks meet
        assert dtypes == {torch.float32}
        assert zero == 2 or kept == 0


def _shared_gradient_job():
    """The gradient that `enter` sums over ranks also goes elsewhere, unsummed."""
    tp = ProcessGroupTP(dist.group.WORLD, 2, dist.get_rank())
    x, z = (torch.zeros(3, requires_grad=True) for _ in range(2))
    other = z * 1  # made before, so in backward it comes after
    ((tp.enter(x) + other) * torch.arange(3.0)).sum().backward()
    return x.grad.tolist(), z.grad.tolist()


def test_a_sum_in_backward_leaves_the_gradient_that_others_hold():
    assert run_ranks(2, _shared_gradient_job) == [([0.0, 2.0, 4.0], [0.0, 1.0, 2.0])] * 2


def _forgets_backward_sum(self, x):
    return x


def _wrong_job(config, fault):
    if fault == "no sum in backward":
        ProcessGroupTP.enter = _forgets_backward_sum
    if fault == "replica counted twice":
        import megabus.engine.engine as engine_module

        class Sharded:
            """A spec that calls replicated parameters sharded."""

            def __init__(self, spec):
                self.is_matrix, self.unit, self.sharded, self.name = (
                    spec.is_matrix,
                    spec.unit,
                    True,
                    spec.name,
                )

        engine_module.spec_of = lambda parameter: Sharded(spec_of(parameter))
    return parity.engine_job(config, steps=1)


def test_negative_controls(monkeypatch):
    """The comparison sees a missing all-reduce in the backward pass, and a norm that counts replicas twice."""
    config = parity.parity_training("ngpt", Layout(2, 1, 1), micro_batch_size=8)
    wrong = run_ranks(2, _wrong_job, config, "no sum in backward")[0]
    assert abs(wrong["norms"][0] - reference("ngpt").grad_norms[0]) > 1e-3
    wrong = run_ranks(2, _wrong_job, config, "replica counted twice")[0]
    assert abs(wrong["norms"][0] / reference("ngpt").grad_norms[0] - 1) > 1e-4
    right = trace_of_defaults("ngpt", Layout(2, 1, 1))
    assert abs(right.grad_norms[0] / reference("ngpt").grad_norms[0] - 1) < 1e-5


def _hangs():
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(60)


def _raises():
    if dist.get_rank() == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def test_the_pool_shows_stacks_and_tracebacks():
    with pytest.raises(RuntimeError, match=r"(?s)hung.*rank 0.*_hangs"):
        run_ranks(2, _hangs, timeout=3)
    with pytest.raises(RuntimeError, match="rank one is unwell"):
        run_ranks(2, _raises, timeout=20)


def test_uneven_vocabulary_leaves_no_padding():
    """Shards differ by a row and cover the vocabulary: no rank holds a row that the model does not have."""
    stage = parity.parity_training("ngpt", Layout(4, 1, 1)).stage
    from megabus.parallel.placement import Placement

    placement = Placement(stage.model, stage.layout)
    heads = sorted(piece.start for r in range(4) for piece in placement.owned(r) if piece.name == "embed.weight")
    assert [start // 37 for start in heads] == [0, 16, 33, 50]
    assert sum(len(p) for r in range(4) for p in placement.owned(r) if p.name == "embed.weight") == 67 * 37
    assert torch.isfinite(trace_of_defaults("ngpt", Layout(4, 1, 1)).logits).all()


def test_the_comparison_does_not_pass_nan_over():
    """A gradient that no rank delivered, a loss that is none: infinitely far, not equal."""
    right = reference("gpt")
    assert parity.difference(right, right).worst == 0
    for spoil in ("grads", "losses", "grad_norms", "logits"):
        wrong = copy.deepcopy(right)
        if spoil == "grads":
            wrong.grads["layers.2.mlp.up"][3, 4] = math.nan
        elif spoil == "logits":
            wrong.logits[1, 2, 3] = math.nan
        else:
            getattr(wrong, spoil)[2] = math.nan
        assert parity.difference(wrong, right).worst == math.inf
