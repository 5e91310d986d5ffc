"""Tensor parallelism over a process group: `megabus.model.tensor_parallel`'s functions as collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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

    def within(self, parameter: Tensor) -> Tensor:
        return parameter if self.size == 1 else _Enter.apply(parameter, self)

    def sum(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.SUM)

    def max(self, x: Tensor) -> Tensor:
        return self._reduce(x, dist.ReduceOp.MAX)

    def _reduce(self, x: Tensor, op: Any) -> Tensor:
        if self.size > 1:
            x = x.contiguous()
            self._all_reduce(x, op)
        return x

    # Collectives cut the first axis and T is the second: that costs a copy, and none where B is 1.
    def gather(self, x_BtD: Tensor) -> Tensor:
        """(B, T, D) from the T / size positions of each rank."""
        parts = x_BtD.new_empty(self.size, *x_BtD.shape)
        self._all_gather(parts.flatten(0, 1), x_BtD.contiguous())
        return parts.transpose(0, 1).flatten(1, 2)

    def scatter(self, x_BTD: Tensor) -> Tensor:
        """The sum over ranks of this rank's T / size positions."""
        parts = x_BTD.unflatten(1, (self.size, -1)).transpose(0, 1).contiguous()
        own_BtD = torch.empty_like(parts[0])
        self._reduce_scatter(own_BtD, parts.flatten(0, 1))
        return own_BtD

    # The three messages, apart from what they take of memory: `megabus.estimate` counts that without a process group.
    def _all_reduce(self, x: Tensor, op: Any) -> None:
        dist.all_reduce(x, op=op, group=self.group)

    def _all_gather(self, all_: Tensor, own: Tensor) -> None:
        dist.all_gather_single(all_, own, group=self.group)

    def _reduce_scatter(self, own: Tensor, all_: Tensor) -> None:
        dist.reduce_scatter_single(own, all_, group=self.group)


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
