"""Unit norm in the fp32 masters, rows cut by ZeRO boundaries included."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megabus.engine import vectors as vectors_room
from megabus.engine.unit_rows import UnitRows
from megabus.engine.vectors import Vectors
from megabus.kernels import eager
from megabus.testing.ranks import run_ranks


def _fake_engine(flat):
    """Just enough of an engine: a flat partition and an inner optimizer over it."""
    inner = torch.optim.SGD([flat], lr=0.1)
    return SimpleNamespace(optimizer=SimpleNamespace(fp32_groups_flat_partition=[flat], optimizer=inner))


def _normalise(rows, width, fault=None):
    """Each rank holds an equal share of (rows, width), padded at the end; returns shares after one SGD step."""
    rank, world = dist.get_rank(), dist.get_world_size()
    total = rows * width
    partition = -(-total // (2 * world)) * 2
    matrix = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(partition * world)
    padded[:total] = matrix.flatten()
    flat = padded[rank * partition : (rank + 1) * partition].clone().requires_grad_()
    if fault == "no all-reduce":
        vectors_room.dist = type("NoDist", (), {**vars(dist), "all_reduce": staticmethod(lambda *a, **k: None)})
    engine = _fake_engine(flat)
    keeper = UnitRows(engine, Vectors(flat, width, total, dist.group.WORLD), eager.unit_rows_)
    flat.grad = torch.zeros_like(flat)
    engine.optimizer.optimizer.step()
    return flat.detach(), float(keeper.error()), keeper.vectors.n_cut


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(("rows", "width"), [(5, 37), (4, 8), (1, 101), (3, 50), (2, 3), (16, 16)])
def test_rows_are_unit_whatever_the_cuts(world, rows, width):
    shares = run_ranks(world, _normalise, rows, width)
    whole = torch.cat([share for share, _, _ in shares])
    matrix = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole[: rows * width].view(rows, width), matrix / matrix.norm(dim=1, keepdim=True))
    assert not whole[rows * width :].any()  # padding stays zero
    assert max(error for _, error, _ in shares) <= 1e-6


def test_negative_control_without_the_all_reduce():
    shares = run_ranks(4, _normalise, 5, 37, "no all-reduce")
    assert shares[0][2] > 0
    whole = torch.cat([share for share, _, _ in shares])[: 5 * 37].view(5, 37)
    assert (whole.norm(dim=1) - 1).abs().max() > 1e-3
