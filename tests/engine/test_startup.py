"""Leaving the process group together, however long rank 0 still has to say something."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from megabus.engine.startup import stop_distributed
from megabus.testing.ranks import run_ranks

HANG = timedelta(seconds=1)


def _leave(barrier):
    """The others come 2.5 seconds before rank 0, with a group whose operations end after one."""
    dist.barrier()
    dist.distributed_c10d._set_pg_timeout(HANG, dist.group.WORLD)
    if dist.get_rank() == 0:
        time.sleep(2.5)
    try:
        dist.barrier() if barrier else stop_distributed()
    except RuntimeError as error:
        return type(error).__name__
    return None


def test_a_slow_last_word_is_waited_for():
    assert run_ranks(2, _leave, False) == [None, None]
    assert run_ranks(2, _leave, True)[1] is not None  # negative control: the run's own group does not
