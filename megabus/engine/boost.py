"""A larger learning rate for chosen rows: what Adam has moved them by is multiplied, in the fp32 masters.

Adam's step is linear in lr, weight decay included, so that is what `factor` times the learning rate would have done,
whichever Adam runs. Adam itself sees a partition as one tensor and has no learning rate for some of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabus.engine.fragments import Place, flat_partitions, inner_optimizer
from megabus.upload import upload


@dataclass(frozen=True)
class _Rows:
    """Chosen rows of a flat partition (n,).

    numbers: of the whole ones (N,) int64, where rows of `width` entries begin at entry `head`; cut: the parts that are
    here of chosen rows that the partition's ends cut.
    """

    flat: Tensor
    head: int
    width: int
    numbers: Tensor
    cut: list[slice]

    def _whole(self) -> Tensor:
        n = (self.flat.numel() - self.head) // self.width
        return self.flat.detach()[self.head : self.head + n * self.width].view(n, self.width)

    def read(self) -> list[Tensor]:
        """Copies: the whole rows (N, width), then each cut one's part (n_i,)."""
        return [self._whole().index_select(0, self.numbers), *(self.flat.detach()[part].clone() for part in self.cut)]

    def stretch(self, was: list[Tensor], factor: float) -> None:
        """Multiply what the rows have moved by since they were `was`, which is used up."""
        for old, now in zip(was, self.read(), strict=True):
            old.lerp_(now, factor)
        self._whole().index_copy_(0, self.numbers, was[0])
        for part, row in zip(self.cut, was[1:], strict=True):
            self.flat.detach()[part] = row


class Boost:
    """Multiplies the learning rate of the rows that `set_rows` chose by `factor`, which its user sets before a step.
    While it is 1, or no row is chosen, nothing is copied.

    engine: DeepSpeed's. own: what this rank owns, and where.
    """

    def __init__(self, engine: Any, own: Sequence[Place]) -> None:
        self.factor = 1.0
        self._flats = flat_partitions(engine)
        self._own = own
        self._rows: list[_Rows] = []
        self._before: list[tuple[_Rows, list[Tensor]]] = []
        inner = inner_optimizer(engine)
        self._hooks = [inner.register_step_pre_hook(self._keep), inner.register_step_post_hook(self._stretch)]

    def set_rows(self, added: Callable[[str], np.ndarray]) -> None:
        """Choose rows, in place of those before: `added` tells them by the parameter's name, (global rows,) bool."""
        found: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
        for place in self._own:
            piece, width = place.piece, place.width
            rows = np.flatnonzero(added(place.piece.name))
            start, stop = np.maximum(rows * width, piece.start), np.minimum((rows + 1) * width, piece.stop)
            here, at = start < stop, place.part.start - piece.start
            found.setdefault(place.group, []).append((width, start[here] + at, stop[here] + at))
        self._rows = []
        for group, parts in found.items():
            flat, width = self._flats[group], parts[0][0]  # a group's rows are all as wide
            starts, stops = (np.concatenate(ends) for ends in list(zip(*parts, strict=True))[1:])
            whole = starts[stops - starts == width]
            head = int(whole[0]) % width if len(whole) else 0
            numbers = upload((whole - head) // width, flat.device)
            ends = zip(starts.tolist(), stops.tolist(), strict=True)
            cut = [slice(start, stop) for start, stop in ends if stop - start < width]
            if len(starts):
                self._rows.append(_Rows(flat, head, width, numbers, cut))

    @torch.no_grad()
    def _keep(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._before = []  # if a step failed halfway, its rows are still here
        if self.factor == 1.0:
            return
        # ZeRO in fp32 steps one group at a time: other groups have calls of their own.
        stepping = {id(flat) for group in optimizer.param_groups for flat in group["params"]}
        self._before = [(rows, rows.read()) for rows in self._rows if id(rows.flat) in stepping]

    @torch.no_grad()
    def _stretch(self, *_: Any) -> None:
        before, self._before = self._before, []
        for rows, was in before:
            rows.stretch(was, self.factor)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
