"""Running means of the masters (EMA), one fp32 tensor a decay, cut over ranks as the masters are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megabus.engine.fragments import Place, flat_partitions, inner_optimizer
from megabus.engine.unit_rows import UnitRows
from megabus.parallel.fragments import Fragments, Kind, ema_kind


def share(decay: float, number: int) -> float:
    """What the `number`-th update's weights (1, 2, ...) get of the mean: (1 - d) / (1 - d^number).

    So mean_n = sum_i (1 - d) d^(n - i) w_i / (1 - d^n): Adam's bias correction (Kingma & Ba 2015, arXiv 1412.6980,
    section 3) in the form of a mean of the weights themselves. The first is the weights as they are, and none of the
    initial ones stays in it.
    """
    return (1 - decay) / (1 - decay**number)


class Averages:
    """Read-only for training: they follow the masters after every update, and nothing follows them.

    engine: DeepSpeed's. own: what this rank owns, and where. Hooks that change the masters after Adam must
    have been registered before. updates: by kind, how many each is a mean of; one of none is the weights as they are.
    unit_rows: of the engine, if its model has such. Without decays nothing is held and nothing is done.

    A mean of unit vectors lies inside the sphere, the deeper the more they have turned. It is held, saved and grown as
    it is; what computes with it takes its direction, which is nearer to a weight that training could have made.
    """

    def __init__(self, engine: Any, own: Sequence[Place], decays: Sequence[float], unit_rows: UnitRows | None) -> None:
        self._engine, self._own, self._unit_rows = engine, own, unit_rows
        self._flats = flat_partitions(engine)
        self._decays = {ema_kind(decay): decay for decay in decays}
        self.updates = dict.fromkeys(self._decays, 0)
        self._means = {kind: [torch.zeros_like(flat) for flat in self._flats] for kind in self._decays}
        inner = inner_optimizer(engine)
        self._hook = inner.register_step_post_hook(self._follow) if decays else None

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(self._decays)

    @torch.no_grad()
    def _follow(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # ZeRO in fp32 steps one group at a time: the last one ends the update.
        stepped = {id(flat) for group in optimizer.param_groups for flat in group["params"]}
        for kind, decay in self._decays.items():
            for flat, mean in zip(self._flats, self._means[kind], strict=True):
                if id(flat) in stepped:
                    mean.lerp_(flat, share(decay, self.updates[kind] + 1))
            self.updates[kind] += id(self._flats[-1]) in stepped

    def read(self) -> Fragments:
        """Views of what this rank owns, in canonical order."""
        return {
            place.piece: {kind: means[place.group][place.part] for kind, means in self._means.items()}
            for place in self._own
        }

    @torch.no_grad()
    def write(self, new: Fragments, updates: Mapping[Kind, int]) -> None:
        """Set those that `updates` counts, which are taken out of `new`; the others begin with the masters that are
        there now."""
        mine = self.read() if self._decays else {}
        for kind in self._decays:
            self.updates[kind] = updates.get(kind, 0)
            for flat, mean in zip(self._flats, self._means[kind], strict=True):
                mean.copy_(flat)
            if kind in updates:
                for piece, tensors in mine.items():
                    tensors[kind].copy_(new[piece].pop(kind))

    @contextmanager
    def in_place_of_masters(self, kind: Kind) -> Iterator[None]:
        """Until the block ends the masters are a mean, its unit rows made unit. Whatever is made of the masters must be
        made again, then and afterwards. Collective."""
        kept = [flat.data for flat in self._flats]
        try:
            for flat, mean in zip(self._flats, self._means[kind], strict=True):
                flat.data = mean
            if self._unit_rows is not None:
                flat = self._unit_rows.vectors.flat
                flat.data = flat.data.clone()
                self._unit_rows.normalise()
            yield
        finally:
            for flat, own in zip(self._flats, kept, strict=True):
                flat.data = own

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
