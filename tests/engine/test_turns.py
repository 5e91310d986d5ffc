"""The cap on what rows turn by in a step: exact on rows that ZeRO cuts, and the embedding's are free."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megabus.config import Layout
from megabus.engine import turns
from megabus.engine import vectors as vectors_room
from megabus.engine.engine import Engine
from megabus.engine.turns import AngleCap
from megabus.engine.unit_rows import UnitRows
from megabus.engine.vectors import Vectors
from megabus.kernels import eager
from megabus.model.init import build_model
from megabus.model.params import spec_of
from megabus.testing import parity
from megabus.testing.ranks import run_ranks

BOUND = 0.02


def rows_and_moves(rows, width):
    """Unit rows, and what a step adds to them: along them, across them, back through the origin, nothing."""
    draw = torch.Generator().manual_seed(0)
    matrix = F.normalize(torch.randn(rows, width, generator=draw), dim=1)
    sizes = torch.tensor([1e-4, 1e-2, 0.3, 3.0, 0.0])[torch.arange(rows) % 5]
    moves = sizes[:, None] * F.normalize(torch.randn(rows, width, generator=draw), dim=1)
    moves[1::7] = -1.5 * matrix[1::7]
    return matrix, moves


def turned(matrix, moves, free):
    """In fp64: where the moved rows end."""
    old, new = matrix.double(), (matrix + moves).double()
    old = F.normalize(old, dim=1)
    angle = torch.acos((old * F.normalize(new, dim=1)).sum(1).clamp(-1, 1))
    tangent = F.normalize(new - (new * old).sum(1, keepdim=True) * old, dim=1)
    there = old * torch.cos(angle.clamp(max=BOUND))[:, None] + tangent * torch.sin(angle.clamp(max=BOUND))[:, None]
    there[free] = F.normalize(new, dim=1)[free]
    return F.normalize(there, dim=1), angle


def _step(rows, width, free, fault=None):
    """Each rank holds an equal share of the rows, padded at the end; its share after one step of SGD."""
    rank, world = dist.get_rank(), dist.get_world_size()
    total = rows * width
    partition = -(-total // (2 * world)) * 2
    matrix, moves = rows_and_moves(rows, width)
    mine = slice(rank * partition, (rank + 1) * partition)
    flat, grad = (F.pad(x.flatten(), (0, partition * world - total))[mine].clone() for x in (matrix, -moves))
    flat.requires_grad_()
    if fault == "no all-reduce":
        vectors_room.dist = type("NoDist", (), {**vars(dist), "all_reduce": staticmethod(lambda *a, **k: None)})
    inner = torch.optim.SGD([flat], lr=1.0)
    engine = SimpleNamespace(optimizer=SimpleNamespace(fp32_groups_flat_partition=[flat], optimizer=inner))
    vectors = Vectors(flat, width, total, dist.group.WORLD)
    start, stop = (min(max(row * width - mine.start, 0), partition) for row in free)
    turns.BLOCK = 2 * width  # several blocks
    cap = AngleCap(engine, vectors, [slice(start, stop)] if stop > start else [], BOUND)
    keeper = UnitRows(engine, vectors, eager.unit_rows_)
    flat.grad = grad
    inner.step()
    assert cap._before is None
    return flat.detach(), float(keeper.error())


def stepped(world, rows, width, free, fault=None):
    shares = run_ranks(world, _step, rows, width, free, fault)
    whole = torch.cat([share for share, _ in shares])
    assert not whole[rows * width :].any()  # padding stays zero
    return whole[: rows * width].view(rows, width).double(), max(error for _, error in shares)


@pytest.mark.parametrize(("world", "rows", "width"), [(1, 23, 37), (3, 23, 37), (4, 11, 8), (4, 1, 101), (3, 2, 3)])
def test_rows_turn_by_the_bound_at_most(world, rows, width):
    free = (rows // 4, rows // 2)
    now, error = stepped(world, rows, width, free)
    wanted, angle = turned(*rows_and_moves(rows, width), slice(*free))
    capped = torch.ones(rows, dtype=torch.bool)
    capped[slice(*free)] = False
    back = capped & (torch.arange(rows) % 7 == 1)  # through the origin, in no direction: within the bound is enough
    torch.testing.assert_close(now[~back], wanted[~back], rtol=0, atol=3e-6)
    assert bool(((now * rows_and_moves(rows, width)[0]).sum(1)[back] >= 1 - BOUND**2).all())
    assert error <= 1e-6
    assert rows < 20 or ((angle > BOUND) & capped).sum() > 5 < ((angle < BOUND) & capped).sum()


def test_negative_control_without_the_all_reduce():
    wanted, _ = turned(*rows_and_moves(23, 37), slice(0, 0))
    now, _ = stepped(4, 23, 37, (0, 0), "no all-reduce")
    assert (now - wanted)[2:].abs().max() > 1e-3


# ---- in an engine: with the gate, against plain PyTorch ------------------------------------------------------

STEPS = 3
RECIPE = {"max_angle": 0.004, "gate": 0.5, "eps": 1e-4}


def training_of(layout, **train):
    training = parity.parity_training("ngpt", layout, **train)
    return replace(training, optimizer=training.optimizer.model_copy(update=RECIPE))


@functools.cache
def plain(batch):
    """Losses and masters of the same training without an engine, and the largest angle a step of the embedding."""
    training = training_of(Layout(1, 1, 1), global_batch_size=batch)
    optim, model = training.optimizer, build_model(training.stage.model)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    losses, widest = [], 0.0
    for step in range(STEPS):
        inputs, targets = parity.batch_of(training.stage, step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        model.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for name, p in model.named_parameters():
                m, v = moments[name]
                m.mul_(optim.beta1).add_((1 - optim.beta1) * p.grad)
                v.mul_(optim.beta2).add_((1 - optim.beta2) * p.grad**2)
                d = (v / (1 - optim.beta2 ** (step + 1))).sqrt() + 1e-20
                gate = torch.sigmoid(optim.gate * torch.log(d / optim.eps))
                old = p.clone()
                p -= optim.lr * gate * m / (1 - optim.beta1 ** (step + 1)) / d
                if not spec_of(p).is_matrix:
                    continue
                w, x = F.normalize(old.double(), dim=1), F.normalize(p.double(), dim=1)
                across = x - (x * w).sum(1, keepdim=True) * w
                angle = torch.asin(across.norm(dim=1, keepdim=True))
                if spec_of(p).lookup:
                    widest = max(widest, float(angle.max()))
                else:
                    bound = angle.clamp(max=optim.max_angle)
                    x = torch.cos(bound) * w + torch.sin(bound) * F.normalize(across, dim=1)
                p.copy_(x)
    return losses, {name: p.detach() for name, p in model.named_parameters()}, widest


CASES = {
    "one": (Layout(1, 1, 1), {}),
    "dp3": (Layout(1, 1, 3), {"global_batch_size": 18}),
    "zero2": (Layout(1, 1, 2), {"zero_stage": 2}),
    "tp2 pp2": (Layout(2, 2, 1), {"micro_batch_size": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_layout_equals_one_process(case):
    layout, train = CASES[case]
    losses, masters, widest = plain(train.get("global_batch_size", 16))
    trace = parity.engine_trace(training_of(layout, **train), steps=STEPS)
    assert trace.losses == pytest.approx(losses, abs=1e-5)
    assert max(float((trace.masters[name] - rows).abs().max()) for name, rows in masters.items()) <= 1e-5
    assert trace.unit_error <= 1e-6
    assert widest > 2 * RECIPE["max_angle"]  # so the embedding must have been free


def _angles(training, bounds):
    """Largest angles a step of rows that are capped and of the embedding's; and whether a copy was ever made."""
    engine = Engine(training.train, training.optimizer, training.stage)
    engine.write_initial(0)
    found, keep = [], engine.angle_cap._keep
    for number, bound in enumerate(bounds):
        engine.angle_cap.bound = bound
        old = {piece: tensors["weight"].clone() for piece, tensors in engine.read().items()}
        engine.train_step(parity.rank_batches(engine, parity.batch_of(engine.stage, number)), training.optimizer.lr)
        widest = {True: 0.0, False: 0.0}
        for piece, tensors in engine.read().items():
            spec = engine.placement.specs[piece.name]
            if spec.is_matrix:
                was, now = (x.double().view(-1, 37) for x in (old[piece], tensors["weight"]))
                across = now - (now * was).sum(1, keepdim=True) * was
                widest[spec.lookup] = max(widest[spec.lookup], float(torch.asin(across.norm(dim=1)).max()))
        found.append((widest[False], widest[True]))
    assert keep.__self__._before is None
    error = engine.unit_error()
    engine.close()
    return found, error


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bound_may_change_from_step_to_step(precision):
    training = parity.parity_training("ngpt", Layout(1, 1, 1), precision=precision)
    ((free, tight, loose, off), error) = run_ranks(1, _angles, training, [torch.inf, 1e-3, 2e-3, torch.inf])[0]
    assert tight[0] == pytest.approx(1e-3, rel=1e-4)
    assert loose[0] == pytest.approx(2e-3, rel=1e-4)
    assert min(free[0], off[0], tight[1], loose[1]) > 5e-3
    assert error <= 1e-6
