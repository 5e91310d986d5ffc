"""What a model needs to know of tensor parallelism: four functions. `Unsharded` is a model on its own."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class TensorParallel(Protocol):
    """The ranks that together hold one model's rows.

    enter: identity forward, sum over ranks backward (before row-sharded `read` matrices).
    leave: sum over ranks forward, identity backward (after row-sharded `write` matrices).
    sum, max: reductions of detached tensors, in place.
    """

    size: int
    rank: int

    def enter(self, x: Tensor) -> Tensor: ...
    def leave(self, x: Tensor) -> Tensor: ...
    def sum(self, x: Tensor) -> Tensor: ...
    def max(self, x: Tensor) -> Tensor: ...


class Unsharded:
    """One rank holds everything."""

    size, rank = 1, 0

    def enter(self, x: Tensor) -> Tensor:
        return x

    def leave(self, x: Tensor) -> Tensor:
        return x

    def sum(self, x: Tensor) -> Tensor:
        return x

    def max(self, x: Tensor) -> Tensor:
        return x
