"""The process groups of one layout, and tensor parallelism over one of them."""

from __future__ import annotations

import contextlib
import io
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import comm as ds_comm
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology
from torch import Tensor

from megabus.config.stages import Layout
from megabus.parallel.topology import Coordinate, coordinate

_groups: dict[tuple[int, ...], Any] = {}


def reuse_process_groups(timeout: timedelta) -> None:
    """Make DeepSpeed ask for each set of ranks only once in a process's life.

    It makes a dozen groups for every engine; without this each growth would leak them, with their threads and
    sockets. All ranks ask in the same order, so a hit on one is a hit on all.
    """
    if getattr(ds_comm.new_group, "reused", False):
        return

    def new_group(ranks: Any) -> Any:
        members = tuple(ranks)
        if members not in _groups:
            _groups[members] = dist.new_group(list(members), timeout=timeout)
        return _groups[members]

    new_group.reused = True  # type: ignore[attr-defined]
    ds_comm.new_group = new_group


def process_groups() -> tuple[int, int]:
    """(groups that this process has been asked for, those of them that it is a member of)."""
    rank = dist.get_rank()
    return len(_groups), sum(rank in members for members in _groups)


def forget_process_groups() -> None:
    """After the process group is destroyed its subgroups are dead."""
    _groups.clear()


class ProcessGroupTP:
    """`megabus.model.tensor_parallel.TensorParallel` over a process group."""

    def __init__(self, group: dist.ProcessGroup, size: int, rank: int, sequence_parallel: bool = False) -> None:
        self.group, self.size, self.rank = group, size, rank
        self.sequence_parallel = sequence_parallel and size > 1

    def enter(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return _Gather.apply(x, self)
        return x if self.size == 1 else _Enter.apply(x, self)

    def leave(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return _Scatter.apply(x, self)
        return x if self.size == 1 else _Leave.apply(x, self)

    def shared(self, parameter: Tensor) -> Tensor:
        return _Enter.apply(parameter, self) if self.sequence_parallel else parameter

    def sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            x = x.contiguous()
            dist.all_reduce(x, op=op, group=self.group)
        return x

    # Collectives cut the first axis and T is the second: that costs a copy, and none where B is 1.
    def gather(self, x_BtD: Tensor) -> Tensor:
        """(B, T, D) from the T / size positions of each rank."""
        parts = x_BtD.new_empty(self.size, *x_BtD.shape)
        dist.all_gather_single(parts.flatten(0, 1), x_BtD.contiguous(), group=self.group)
        return parts.transpose(0, 1).flatten(1, 2)

    def scatter(self, x_BTD: Tensor) -> Tensor:
        """The sum over ranks of this rank's T / size positions."""
        parts = x_BTD.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        own_BtD = torch.empty_like(parts[0])
        dist.reduce_scatter_single(own_BtD, parts.flatten(0, 1), group=self.group)
        return own_BtD


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: ProcessGroupTP) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.sum(grads[0].clone()), None  # autograd may hold the gradient elsewhere too


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: ProcessGroupTP) -> Tensor:
        ctx.mark_dirty(x)
        return tp.sum(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: ProcessGroupTP) -> Tensor:
        ctx.tp = tp
        return tp.gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.scatter(grads[0]), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: ProcessGroupTP) -> Tensor:
        ctx.tp = tp
        return tp.scatter(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.tp.gather(grads[0]), None


class Mesh:
    """One layout of the world as process groups, seen from this rank. `grid` is the form DeepSpeed wants."""

    def __init__(self, layout: Layout, sequence_parallel: bool = False) -> None:
        topology = PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its ranks
            self.grid = PipelineParallelGrid(topology=topology)
        self.layout, self.topology = layout, topology
        self.rank = dist.get_rank()
        self.at: Coordinate = coordinate(layout, self.rank)
        self.tp = ProcessGroupTP(self.grid.get_slice_parallel_group(), layout.tp, self.at.tp, sequence_parallel)
        self.dp_group = self.grid.get_data_parallel_group()
