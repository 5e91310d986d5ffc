"""A tied head at the other end of a pipeline than the embedding whose rows it multiplies with.

The first pipeline rank owns the rows: their masters, their moments, what is saved and grown. The last one borrows them.
Its gradients are added to the owner's, and after every step and every write it takes over the owner's values: there is
one master, so the two ends cannot drift apart, however their partitions are cut.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

from megabus.model.params import spec_of
from megabus.parallel.mesh import Mesh
from megabus.parallel.topology import rank_of


class Pipeline(PipelineModule):
    """DeepSpeed's, whose engine asks it once a step for the weights whose gradients are to be summed, after the last
    backward pass and before data-parallel ranks sum theirs."""

    tied: TiedRows | None = None

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        return [] if self.tied is None else [(self.tied.weight, self.tied.group)]


class TiedRows:
    """Of the rank that owns the rows (`borrows` False), or of the one that borrows them.

    weight: the rows, in this rank's shard of the vocabulary; group: of the two ranks; owner: its rank in the world.
    fp32_sums: whether DeepSpeed adds up gradients beside the parameter, in fp32, as it does in bf16 training.
    """

    def __init__(
        self, weight: nn.Parameter, group: dist.ProcessGroup, owner: int, *, borrows: bool, fp32_sums: bool
    ) -> None:
        self.weight, self.group, self.owner = weight, group, owner
        self._borrows, self._sum = borrows, torch.zeros(0)
        if borrows and fp32_sums:
            self._sum = torch.zeros_like(weight, dtype=torch.float32)
            weight._hp_grad = self._sum  # type: ignore[attr-defined]  # where DeepSpeed looks for it
            weight.register_post_accumulate_grad_hook(self._add)

    @torch.no_grad()
    def _add(self, weight: Tensor) -> None:
        if weight.grad is not None:
            self._sum += weight.grad
            weight.grad = None

    @torch.no_grad()
    def take_over(self) -> None:
        """Let the borrowed rows be the owner's, and their gradients nothing. Collective over the two ranks."""
        dist.broadcast(self.weight.data, self.owner, group=self.group)
        if self._borrows:
            self.weight.grad = None
            self._sum.zero_()


def tied_rows(module: nn.Module, mesh: Mesh, fp32_sums: bool) -> TiedRows | None:
    """This rank's, where a pipeline has an embedding and a head that are tied; None elsewhere. Collective.

    module: what DeepSpeed runs on this rank, once it has its dtype.
    """
    group = mesh.ends_group()
    weight = next((p for p in module.parameters() if spec_of(p).tied), None)
    if weight is None:
        return None
    owner = rank_of(mesh.layout, 0, mesh.at.dp, mesh.at.tp)
    return TiedRows(weight, group, owner, borrows=mesh.at.pp > 0, fp32_sums=fp32_sums)
