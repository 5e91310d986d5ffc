"""How ranks leave: together, however long one of them takes."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megabus.engine import startup
from megabus.testing.ranks import run_ranks

HANG = timedelta(seconds=0.3)


def _leave(leaving):
    """As after a training with a short faults.hang_timeout whose rank 0 still draws its report."""
    startup.LEAVING = leaving
    dist.distributed_c10d._set_pg_timeout(HANG)
    if dist.get_rank() == 0:
        time.sleep(4 * HANG.total_seconds())
    startup.stop_distributed()
    return dist.is_initialized()


def test_a_slow_report_fails_no_other_rank():
    assert run_ranks(2, _leave, startup.LEAVING) == [False, False]


def test_negative_control_within_the_time_out_of_training():
    with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
        run_ranks(2, _leave, HANG)
