"""Groups of ranks, and the threads that serve them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed import comm as ds_comm

from megabus.config import Layout
from megabus.parallel.mesh import Mesh
from megabus.testing.ranks import run_ranks


def priorities() -> tuple[int, set[int]]:
    """What the system thinks of this rank, and of gloo's threads: its first group's, and those of one asked for now."""
    ds_comm.new_group([0, 1])
    threads = [thread for thread in Path("/proc/self/task").iterdir() if "gloo_tcp" in (thread / "comm").read_text()]
    assert len(threads) >= 2
    nice = {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads}
    return os.getpriority(os.PRIO_PROCESS, os.getpid()), nice


@pytest.mark.skipif(platform.system() != "Linux", reason="threads have priorities of their own on Linux alone")
def test_threads_that_poll_leave_the_cores_to_ranks():
    for rank, polling in run_ranks(2, priorities):
        assert min(polling) > rank


def sums_after_a_pipeline() -> tuple[float, float, float]:
    """The world goes from a pipeline of four, whose ends share a group, to two pipelines of two: sums of ranks over the
    ends, over a pipeline of two, and over data parallelism."""
    groups = [Mesh(Layout(dp=1, pp=4, tp=1)).ends_group()]
    mesh = Mesh(Layout(dp=2, pp=2, tp=1))
    groups += [mesh.ends_group(), mesh.dp_group]
    ranks = [torch.tensor(float(dist.get_rank())) for _ in groups]
    for rank, group in zip(ranks, groups, strict=True):
        if dist.get_rank(group) >= 0:  # the ranks between the ends are in no group of theirs
            dist.all_reduce(rank, group=group)
    first, second, third = map(float, ranks)
    return first, second, third


def uses_of_new_groups(backend: str) -> int:
    """Groups that are used when they are made, of a world that calls itself by that backend."""
    used = []
    all_reduce, dist.get_backend = dist.all_reduce, lambda *_: backend
    dist.all_reduce = lambda tensor, group: used.append(group) or all_reduce(tensor, group=group)
    for _ in range(2):
        mesh = Mesh(Layout(dp=1, pp=2, tp=1))
    assert backend != "nccl" or mesh.grid.get_pipe_parallel_group() in used
    assert len(set(used)) == len(used)
    return len(used)


def test_nccl_makes_communicators_with_their_groups():
    assert run_ranks(2, uses_of_new_groups, "nccl", timeout=60) == [2, 2]  # the rank alone, and the pipeline
    assert run_ranks(2, uses_of_new_groups, "gloo", timeout=60) == [0, 0]


def test_ranks_that_have_made_fewer_groups_meet_the_others():
    found = run_ranks(4, sums_after_a_pipeline, timeout=60)
    assert found == [(3, 2, 1), (1, 4, 1), (2, 2, 5), (3, 4, 5)]
