"""The process groups of one layout."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from deepspeed import comm as ds_comm
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.topology import PipelineParallelGrid, PipeModelDataParallelTopology

from megabus.config.stages import Layout
from megabus.parallel.tensor_parallel import ProcessGroupTP
from megabus.parallel.topology import Coordinate, coordinate, rank_of

_groups: dict[tuple[int, ...], Any] = {}


def reuse_process_groups(timeout: timedelta) -> None:
    """Make DeepSpeed ask for each set of ranks only once in a process's life, and only for those that this rank is in.

    It makes a dozen groups for every engine; without this each growth would leak them, with their threads and
    sockets. Of a large world it also asks for a group of every other rank: a group is made by its members alone, all of
    which ask in the same order, so a hit on one is a hit on all.
    """
    if getattr(ds_comm.new_group, "reused", False):
        return

    def new_group(ranks: Any) -> Any:
        members = tuple(ranks)
        if dist.get_rank() not in members:
            return dist.GroupMember.NON_GROUP_MEMBER
        if members not in _groups:
            # NCCL's p2p may be going on, for whoever waits for it waits on the device: a communicator made beside it
            # could wait for a rank that waits for this one.
            get_accelerator().synchronize()
            with _named_by(members) as name:
                group = dist.new_group(list(members), timeout=timeout, use_local_synchronization=True)
            if group.group_name != name:
                raise RuntimeError(f"torch {torch.__version__} names the group of ranks {members} {group.group_name!r}")
            _connect(group)
            _groups[members] = group
            leave_cores_to_ranks()
        return _groups[members]

    new_group.reused = True  # type: ignore[attr-defined]
    ds_comm.new_group = new_group
    leave_cores_to_ranks()


def _connect(group: dist.ProcessGroup) -> None:
    """NCCL makes a group's communicator when it is first used: it is used here, where nothing else is under way and all
    members come, in the order in which all ranks are asked for groups."""
    if dist.get_backend(group) == "nccl":
        dist.all_reduce(torch.zeros(1, device=get_accelerator().current_device_name()), group=group)
        get_accelerator().synchronize()


@contextlib.contextmanager
def _named_by(members: tuple[int, ...]) -> Iterator[str]:
    """Groups that torch makes in the block are named by their members.

    Members meet under a group's name. Torch puts into it how many groups the rank has made before, which differs: the
    ends of a pipeline share one more than the ranks between them do. Such ranks would wait for each other for ever.
    """
    name = hashlib.sha1("_".join(map(str, members)).encode(), usedforsecurity=False).hexdigest()
    torch_names = c10d._process_group_name
    c10d._process_group_name = lambda *_, **__: name  # type: ignore[assignment]
    try:
        yield name
    finally:
        c10d._process_group_name = torch_names


def leave_cores_to_ranks() -> None:
    """Give gloo's own threads a low priority, on Linux.

    They poll without a pause while a message waits for a receive that has not been asked for, so where ranks outnumber
    cores they would take those from the ranks that are still to ask for it.
    """
    for thread in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended
            if thread.read_text() == "gloo_tcp_loop\n":
                os.setpriority(os.PRIO_PROCESS, int(thread.parent.name), 15)


def process_groups() -> int:
    """Groups that this process has made: of those that it has been asked for, the ones that it is in."""
    return len(_groups)


def forget_process_groups() -> None:
    """After the process group is destroyed its subgroups are dead."""
    _groups.clear()


class Mesh:
    """One layout of the world as process groups, seen from this rank. `grid` is the form DeepSpeed wants."""

    def __init__(self, layout: Layout, sequence_parallel: bool = False) -> None:
        topology = PipeModelDataParallelTopology(num_pp=layout.pp, num_mp=layout.tp, num_dp=layout.dp)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its ranks
            self.grid = PipelineParallelGrid(topology=topology)
        self.layout, self.topology = layout, topology
        self.rank = dist.get_rank()
        self.at: Coordinate = coordinate(layout, self.rank)
        self.tp = ProcessGroupTP(self.grid.get_slice_parallel_group(), layout.tp, self.at.tp, sequence_parallel)
        self.dp_group = self.grid.get_data_parallel_group()

    def ends_group(self) -> dist.ProcessGroup:
        """Of the first and the last pipeline rank at this rank's place in data and tensor parallelism. Collective."""
        layout, groups = self.layout, {}
        for dp in range(layout.dp):
            for tp in range(layout.tp):
                ends = [rank_of(layout, pp, dp, tp) for pp in (0, layout.pp - 1)]
                groups[dp, tp] = ds_comm.new_group(ends)
        return groups[self.at.dp, self.at.tp]
