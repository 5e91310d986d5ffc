"""What a model needs to know of tensor parallelism: six functions. `Unsharded` is a model on its own."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TensorParallel(Protocol):
    """The ranks that together hold one model's rows.

    enter: identity forward, sum over ranks backward (before row-sharded `read` matrices).
    leave: sum over ranks forward, identity backward (after row-sharded `write` matrices).
    shared: identity; around every parameter that all ranks hold whole, where it acts on h between leave and enter.
    within: identity forward, sum over ranks backward; around every parameter that all ranks hold whole, where it acts
        between enter and leave, on what each rank has a part of.
    sum, max: reductions of detached tensors, in place.

    Under sequence parallelism (Korthikanti et al. 2022) a rank holds T / size positions of h between leave and enter:
    enter: all positions from those of each rank forward, sum over ranks and this rank's positions backward.
    leave: sum over ranks and this rank's positions forward, all positions from those of each rank backward.
    shared: identity forward, sum over ranks backward, for each rank has seen its own positions only.
    """

    size: int
    rank: int

    def enter(self, x: Tensor) -> Tensor: ...
    def leave(self, x: Tensor) -> Tensor: ...
    def shared(self, parameter: Tensor) -> Tensor: ...
    def within(self, parameter: Tensor) -> Tensor: ...
    def sum(self, x: Tensor) -> Tensor: ...
    def max(self, x: Tensor) -> Tensor: ...


class Unsharded:
    """One rank holds everything."""

    size, rank = 1, 0

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x

    def shared(self, parameter: Tensor) -> Tensor:
        return parameter

    def within(self, parameter: Tensor) -> Tensor:
        return parameter

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x
