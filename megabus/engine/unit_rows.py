"""Unit norm in the fp32 masters: after every Adam step, before DeepSpeed casts and gathers the weights.

All matrices are lists of d_model-vectors and form one ZeRO group, so a rank's partition of that group is one run
of vectors whatever matrices they belong to. Only its first and last vector can be cut by the partition's ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megabus.engine.fragments import flat_partitions, inner_optimizer


class UnitRows:
    """Keeps the rows of a flat partition unit.

    flat: this rank's partition, `total` real entries in all partitions together (the rest is padding at the end);
    width: d_model; dp_group: the ranks that hold the other partitions; unit_rows_: see `megabus.kernels.eager`.
    """

    def __init__(
        self,
        engine: Any,
        group: int,
        width: int,
        total: int,
        dp_group: dist.ProcessGroup,
        unit_rows_: Callable[[Tensor], None],
    ) -> None:
        self.flat, self.width, self.dp_group = flat_partitions(engine)[group], width, dp_group
        self.unit_rows_ = unit_rows_
        partition, dp, rank = self.flat.numel(), dist.get_world_size(dp_group), dist.get_rank(dp_group)
        start = min(rank * partition, total)
        stop = min(start + partition, total)
        # Vectors cut by a boundary, numbered alike on every rank; a vector longer than a partition is cut twice.
        inner_ends = [end for end in (r * partition for r in range(1, dp)) if end < total and end % width]
        slots = {row: slot for slot, row in enumerate(sorted({end // width for end in inner_ends}))}
        self.n_cut = len(slots)
        head = min(-start % width, stop - start)  # entries of a vector that began on an earlier rank
        tail = (stop - start - head) % width
        self.cut = []
        if head:
            self.cut.append((slots[start // width], slice(0, head)))
        if tail:
            self.cut.append((slots[(stop - 1) // width], slice(stop - start - tail, stop - start)))
        self.whole = slice(head, stop - start - tail)
        self.hook = inner_optimizer(engine).register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # ZeRO in fp32 steps one group at a time: act on the call that is the matrices'.
        if any(flat is self.flat for group in optimizer.param_groups for flat in group["params"]):
            self.normalise()

    def _rows(self) -> Tensor:
        return self.flat.detach()[self.whole].view(-1, self.width)

    def _cut_lengths(self) -> Tensor:
        """Lengths of the cut vectors, (n_cut,), alike on every data-parallel rank."""
        squares = self.flat.new_zeros(self.n_cut)
        for slot, part in self.cut:
            squares[slot] += self.flat.detach()[part].square().sum()
        dist.all_reduce(squares, group=self.dp_group)
        return squares.sqrt()

    @torch.no_grad()
    def normalise(self) -> None:
        self.unit_rows_(self._rows())
        if self.n_cut:
            lengths = self._cut_lengths()
            for slot, part in self.cut:
                self.flat.detach()[part].div_(lengths[slot])

    @torch.no_grad()
    def error(self) -> Tensor:
        """Largest | |row| - 1 | over the rows of this data-parallel group's partitions that this rank sees: ()."""
        lengths = [torch.linalg.vector_norm(self._rows(), dim=1)]
        if self.n_cut:
            lengths.append(self._cut_lengths())
        together = torch.cat(lengths)
        return (together - 1).abs().max() if len(together) else together.new_zeros(())

    def remove(self) -> None:
        self.hook.remove()
