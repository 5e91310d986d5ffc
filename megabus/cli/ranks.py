"""Start several ranks on this machine, as torchrun does, for a user who needs no other launcher."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from types import FrameType

from megabus.command import NPROC
from megabus.errors import UserError


def start_ranks(nproc: int, command: str, argv: Sequence[str]) -> int:
    """Run `megabus COMMAND ARGV`, less the number of ranks, on `nproc` ranks of this machine.

    Returns 0, or the exit code of the rank that ended first with another. A signal that asks a run to stop is handed
    on to the ranks, which may then take as long to save as they need. Raises `UserError` inside of another launcher.
    """
    if nproc < 1:
        raise UserError(NPROC[0], nproc, "is no number of processes", "give 1 or more")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(NPROC[0], nproc, "is given to a rank that a launcher has started", "leave it out")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import psutil
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks say what has happened; torchrun would add a page of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGHUP,SIGQUIT",  # not those below: it would kill ranks that save for longer than 30 s
    )

    def hand_on(number: int, _: FrameType | None) -> None:
        for rank in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)  # the keyboard has told the ranks itself
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "megabus", command, *_without_nproc(argv))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # as a shell tells a signal
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _without_nproc(argv: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*NPROC)
    return parser.parse_known_args(argv)[1]
