"""A cap on the angle that unit rows turn by in a step: what Adam has turned further is turned back, in the masters.

"Training nGPT", arXiv 2608.01284: all rows but the embedding's have it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, isfinite, sin
from typing import Any

import torch
from torch import Tensor

from megabus.engine.adam import BLOCK, TINY
from megabus.engine.fragments import inner_optimizer
from megabus.engine.vectors import Vectors


class AngleCap:
    """Keeps every vector of a flat partition within `bound` radians of where it was before a step; its user sets it
    before the step. While it is infinite nothing is copied and nothing is sent.

    engine: DeepSpeed's, whose partition `vectors` is of. free: the parts of it whose vectors turn as they like.
    It comes after whatever else moves vectors, and before they are made unit.
    """

    def __init__(self, engine: Any, vectors: Vectors, free: Sequence[slice], bound: float) -> None:
        self.bound, self._vectors = bound, vectors
        self._before: Tensor | None = None
        first, width, n = vectors.whole.start, vectors.width, len(vectors.rows())
        self._capped = torch.ones(n, dtype=torch.bool, device=vectors.flat.device)
        for part in free:  # a part begins and ends with a vector, or with the partition
            low, high = -(-(part.start - first) // width), (part.stop - first) // width
            self._capped[max(low, 0) : max(high, 0)] = False
        self._cut = [(slot, here) for slot, here in vectors.cut if not any(_holds(part, here) for part in free)]
        inner = inner_optimizer(engine)
        self._hooks = [inner.register_step_pre_hook(self._keep), inner.register_step_post_hook(self._turn_back)]

    @torch.no_grad()
    def _keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before = None  # if a step failed halfway, it is still here
        if isfinite(self.bound) and self._vectors.are_stepped_by(optimizer):
            self._before = self._vectors.flat.detach().clone()

    @torch.no_grad()
    def _turn_back(self, *_: Any) -> None:
        before, self._before = self._before, None
        if before is None:
            return
        blocks = max(1, BLOCK // self._vectors.width)
        whole = (self._vectors.rows(), self._vectors.rows(before), self._capped)
        for now, was, capped in zip(*(x.split(blocks) for x in whole), strict=True):
            moved = now - was
            along, square = (was * moved).sum(1), moved.square().sum(1)
            _turn_back_(now, was, moved, along[:, None], square[:, None], self.bound, capped[:, None])
        if not self._vectors.n_cut:
            return
        flat = self._vectors.flat.detach()

        def addends(part: slice) -> list[Tensor]:
            moved = flat[part] - before[part]
            return [(before[part] * moved).sum(), moved.square().sum()]

        sums = self._vectors.cut_sums(2, addends)
        for slot, part in self._cut:
            now, was = flat[part], before[part]
            along, square = sums[slot]
            _turn_back_(now, was, now - was, along, square, self.bound, torch.ones_like(along, dtype=torch.bool))

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _holds(part: slice, inner: slice) -> bool:
    return part.start <= inner.start and inner.stop <= part.stop


def _turn_back_(
    now: Tensor, was: Tensor, moved: Tensor, along: Tensor, square: Tensor, bound: float, capped: Tensor
) -> None:
    """Put vectors, or parts of some, that were `was` (unit) and have `moved` by more than `bound` radians to that angle
    on their way. along, square: of the whole vectors, was . moved and moved . moved.

    The part of the move across the old vector is as long as sqrt(square - along^2). Both are of the move alone: with
    the vector itself in them a small angle would drown in rounding. Where that part is rounding itself, a vector that
    went back through the origin, it gives no direction, and the vector stays about where it was.
    """
    across = (square - along.square()).clamp_(min=0).sqrt_()
    too_far = (torch.atan2(across, 1 + along) > bound) & capped
    turned = cos(bound) * was + (sin(bound) / torch.maximum(across, 1e-3 * square.sqrt() + TINY)) * (
        moved - along * was
    )
    now.copy_(torch.where(too_far, turned, now))
