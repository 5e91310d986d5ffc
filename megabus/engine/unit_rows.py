"""Unit norm in the fp32 masters: after every Adam step, before DeepSpeed casts and gathers the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megabus.engine.fragments import inner_optimizer
from megabus.engine.vectors import Vectors


class UnitRows:
    """Keeps the vectors of a flat partition unit.

    engine: DeepSpeed's, whose partition `vectors` is of; unit_rows_: see `megabus.kernels.eager`.
    """

    def __init__(self, engine: Any, vectors: Vectors, unit_rows_: Callable[[Tensor], None]) -> None:
        self.vectors, self.unit_rows_ = vectors, unit_rows_
        self.hook = inner_optimizer(engine).register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self.vectors.are_stepped_by(optimizer):
            self.normalise()

    def _cut_lengths(self) -> Tensor:
        """Lengths of the cut vectors, (n_cut,), alike on every data-parallel rank."""
        flat = self.vectors.flat.detach()
        return self.vectors.cut_sums(1, lambda part: [flat[part].square().sum()])[:, 0].sqrt()

    @torch.no_grad()
    def normalise(self) -> None:
        self.unit_rows_(self.vectors.rows())
        if self.vectors.n_cut:
            lengths = self._cut_lengths()
            for slot, part in self.vectors.cut:
                self.vectors.flat.detach()[part].div_(lengths[slot])

    @torch.no_grad()
    def error(self) -> Tensor:
        """Largest | |row| - 1 | over the rows of this data-parallel group's partitions that this rank sees: ()."""
        lengths = [torch.linalg.vector_norm(self.vectors.rows(), dim=1)]
        if self.vectors.n_cut:
            lengths.append(self._cut_lengths())
        together = torch.cat(lengths)
        return (together - 1).abs().max() if len(together) else together.new_zeros(())

    def remove(self) -> None:
        self.hook.remove()
