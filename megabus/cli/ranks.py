"""Start several ranks on this machine, for a user who needs no launcher."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Any

from megabus.cli import entry
from megabus.command import NPROC
from megabus.engine.startup import import_deepspeed, importing, on_gpu, prepare_torch
from megabus.errors import UserError

ASK = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # signals that ask a run to stop
END = (signal.SIGHUP, signal.SIGQUIT)  # those that end it at once
PATIENCE = 30.0  # seconds that a rank may then take


def check_ranks(nproc: int | None) -> None:
    """Raise `UserError` where it is no number of ranks; None is one."""
    if nproc is not None and nproc < 1:
        raise UserError(NPROC[0], nproc, "is no number of processes", "give 1 or more")


def start_ranks(nproc: int, command: str, argv: Sequence[str], imports: str) -> int:
    """Run `megabus COMMAND ARGV`, less the number of ranks, on `nproc` ranks of this machine.

    imports: a module that every rank imports. On CPUs that, torch and DeepSpeed are imported once, here, and ranks are
    forked; CUDA does not survive a fork, so on GPUs every rank imports for itself.

    Returns 0, or the exit code of the rank that ended first with another. A signal that asks a run to stop is handed
    on to the ranks, which may then take as long to save as they need; one that comes before there is a rank, or that
    asks for an end at once, gives 128 + its number. Raises `UserError` inside of another launcher.
    """
    of_launcher = any(os.environ.get(name) for name in ("RANK", "TORCHELASTIC_RUN_ID"))
    if of_launcher or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(NPROC[0], nproc, "is given to a rank that a launcher has started", "leave it out")
    handed_on = False

    def hand_on(number: int, _: FrameType | None) -> None:
        nonlocal handed_on
        import psutil

        ranks = psutil.Process().children()
        if not ranks and not handed_on:
            raise _Ended(number)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        handed_on = True

    def end(number: int, _: FrameType | None) -> None:
        raise _Ended(number)

    before = {number: signal.signal(number, hand_on) for number in ASK}
    # A SIGHUP that nohup ignores stays so.
    at_once = [number for number in END if signal.getsignal(number) is not signal.SIG_IGN]
    before |= {number: signal.signal(number, end) for number in at_once}
    try:
        return _started(nproc, [command, *_without_nproc(argv)], imports)
    except _Ended as error:
        return 128 + error.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Ended(BaseException):
    """By a signal. Not an `Exception`: nothing may take it for a failure of its own."""

    def __init__(self, number: int) -> None:
        self.number = number


def _started(nproc: int, words: list[str], imports: str) -> int:
    prepare_torch()
    gpu = on_gpu()
    if not gpu:
        with importing():
            import_deepspeed()
            import_module(imports)
        gc.collect()
        gc.freeze()  # it lives as long as the ranks, whose collections pass it over
    from torch.distributed import TCPStore  # type: ignore[attr-defined]
    from torch.multiprocessing.spawn import ProcessContext, ProcessExitedException, start_processes

    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)  # ranks say what has happened
    ranks: ProcessContext | None = None
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))  # some machines cannot resolve their own names
        port = listening.getsockname()[1]
        try:
            # Until a rank has handlers of its own; and the store's thread is never to take a signal.
            signal.pthread_sigmask(signal.SIG_BLOCK, ASK + END)
            try:
                method = "spawn" if gpu else "fork"
                ranks = start_processes(_rank, (nproc, port, words), nproc, join=False, start_method=method)
                # Where the ranks meet: here and not on rank 0, so that it is there to the end.
                listen = listening.detach()
                store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listen)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, ASK + END)
            while not ranks.join():
                pass
            del store
        except ProcessExitedException as error:
            return error.exit_code if error.exit_code > 0 else 128 - error.exit_code  # as a shell tells a signal
        except _Ended as error:
            if ranks is not None:
                _end(ranks.processes, error.number)
            raise
    return 0


def _end(processes: list[Any], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)
    for process in processes:
        process.join(PATIENCE)
        process.kill()


def _rank(rank: int, nproc: int, port: int, words: list[str]) -> None:
    """A rank's whole life. The launcher's handlers are not its own, and the keyboard's signals reach it through them
    alone: a second one would end it."""
    os.setsid()
    for number in (*ASK, *END):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASK + END)
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{nproc}", LOCAL_WORLD_SIZE=f"{nproc}")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    # torch's words for a launcher that holds the store where ranks meet.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")
    sys.argv[1:] = words
    entry()


def _without_nproc(argv: Sequence[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*NPROC)
    return parser.parse_known_args(argv)[1]
