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


def check_ranks(nproc: int | None) -> None:
    """Raise `UserError` where it is no number of ranks; None is one."""
    if nproc is not None and nproc < 1:
        raise UserError(NPROC[0], nproc, "is no number of processes", "give 1 or more")


def start_ranks(nproc: int, command: str, argv: Sequence[str]) -> int:
    """Run `megabus COMMAND ARGV`, less the number of ranks, on `nproc` ranks of this machine.

    Returns 0, or the exit code of the rank that ended first with another. A signal that asks a run to stop is handed
    on to the ranks, which may then take as long to save as they need; one that comes before there is a rank, or that
    asks for an end at once, gives 128 + its number. Raises `UserError` inside of another launcher.
    """
    of_launcher = any(os.environ.get(name) for name in ("RANK", "TORCHELASTIC_RUN_ID"))
    if of_launcher or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(NPROC[0], nproc, "is given to a rank that a launcher has started", "leave it out")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import psutil
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The ranks say what has happened; torchrun would add a page of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Not those below: torch would kill ranks that save for longer than 30 s. And a SIGHUP that nohup ignores stays so.
    at_once = ["SIGQUIT"] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else ["SIGHUP", "SIGQUIT"]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        local_addr="127.0.0.1",  # some machines cannot resolve their own names
        signals_to_handle=",".join(at_once),
    )
    handed_on = False

    def hand_on(number: int, _: FrameType | None) -> None:
        nonlocal handed_on
        ranks = psutil.Process().children()
        if not ranks and not handed_on:
            raise _NoRank(number)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        handed_on = True

    # The keyboard's SIGINT too: torch starts each rank in a session of its own, which the keyboard does not reach.
    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "megabus", command, *_without_nproc(argv))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # as a shell tells a signal
    except SignalException as error:
        return 128 + error.sigval
    except _NoRank as error:
        return 128 + error.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


class _NoRank(BaseException):
    """A signal found no rank to be handed on to. Not an `Exception`: torch must not take it for a failure to retry."""

    def __init__(self, number: int) -> None:
        self.number = number


def _without_nproc(argv: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*NPROC)
    return parser.parse_known_args(argv)[1]
