"""The d_model-vectors of a rank's flat partition, those included that its ends cut.

All matrices are lists of d_model-vectors and form one ZeRO group, so a rank's partition of that group is one run
of vectors whatever matrices they belong to. Only its first and last vector can be cut by the partition's ends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Vectors:
    """Where the vectors of a flat partition lie.

    flat: this rank's partition, `total` real entries in all partitions together (the rest is padding at the end);
    width: d_model; dp_group: the ranks that hold the other partitions.
    whole: the entries of those vectors that are here as a whole. cut: of each vector that is not, its number among the
    `n_cut` of all ranks and the part that is here.
    """

    def __init__(self, flat: Tensor, width: int, total: int, dp_group: dist.ProcessGroup) -> None:
        self.flat, self.width, self.dp_group = flat, width, dp_group
        partition, dp, rank = flat.numel(), dist.get_world_size(dp_group), dist.get_rank(dp_group)
        start = min(rank * partition, total)
        stop = min(start + partition, total)
        # Vectors cut by a boundary, numbered alike on every rank; a vector longer than a partition is cut twice.
        inner_ends = [end for end in (r * partition for r in range(1, dp)) if end < total and end % width]
        slots = {row: slot for slot, row in enumerate(sorted({end // width for end in inner_ends}))}
        self.n_cut = len(slots)
        head = min(-start % width, stop - start)  # entries of a vector that began on an earlier rank
        tail = (stop - start - head) % width
        self.cut: list[tuple[int, slice]] = []
        if head:
            self.cut.append((slots[start // width], slice(0, head)))
        if tail:
            self.cut.append((slots[(stop - 1) // width], slice(stop - start - tail, stop - start)))
        self.whole = slice(head, stop - start - tail)

    def rows(self, of: Tensor | None = None) -> Tensor:
        """The whole vectors (N, width): a view of the partition, or of a tensor that is laid out as it is."""
        return (self.flat.detach() if of is None else of)[self.whole].view(-1, self.width)

    def are_stepped_by(self, optimizer: torch.optim.Optimizer) -> bool:
        """ZeRO in fp32 steps one group at a time: whether the call is these vectors'."""
        return any(flat is self.flat for group in optimizer.param_groups for flat in group["params"])

    def cut_sums(self, count: int, addends: Callable[[slice], list[Tensor]]) -> Tensor:
        """(n_cut, count): of every cut vector, sums over the ranks that hold a part of it, alike on every data-parallel
        rank. addends: of a part that is here, `count` numbers. Collective."""
        sums = self.flat.new_zeros(self.n_cut, count)
        for slot, part in self.cut:
            sums[slot] += torch.stack(addends(part))
        dist.all_reduce(sums, group=self.dp_group)
        return sums
