"""Groups of ranks, and the threads that serve them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from deepspeed import comm as ds_comm

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
