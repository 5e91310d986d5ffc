"""Ends a rank that makes no progress, with the stacks of all its threads in the log, and says who no longer answers."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megabus.command import peer_is_gone, tell_torchrun
from megabus.train.roll_call import RollCall

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
PATIENCE = 10.0  # seconds to ask who is still there, once a peer is gone
GRACE = 30.0  # seconds at most between a rank's stacks and its end: time for ranks whose last heartbeat was later


class Watchdog:
    """`heartbeat` must be called at least every `timeout` seconds, or the process ends.

    All ranks of a hung job wait, so all of them tell, a little before their end. A thread of Python watches; should the
    hung code hold the interpreter's lock, faulthandler's own thread, which needs none, does the same.
    """

    def __init__(self, timeout: float, rank: int, roll: RollCall | None = None) -> None:
        self.timeout, self.rank, self.roll = timeout, rank, roll
        self.doing = "its start"
        self._heard, self._closed = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def grace(self) -> float:
        return min(GRACE, self.timeout / 3)

    def heartbeat(self, doing: str | None = None) -> None:
        """Progress was made. doing: what comes next, for others to know if this rank is not heard of any more."""
        self.doing = doing or self.doing
        self._heard = time.monotonic()
        faulthandler.dump_traceback_later(self.timeout, exit=True)

    def start(self) -> None:
        self.heartbeat()
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        pause = 0.0
        while not self._closed.wait(pause):
            if self.roll is not None:
                self.roll.sign(self.doing)
            pause = self._heard + self.timeout - self.grace - time.monotonic()
            if pause <= 0:
                self._end()
            pause = pause if self.roll is None else min(pause, self.roll.period)

    def _end(self) -> None:
        heard, grace = self.timeout - self.grace, self.grace
        text = f"rank {self.rank}: no progress for {heard:g} s (faults.hang_timeout, less {grace:g} s to say so)"
        with os.fdopen(os.memfd_create("stacks"), "w+b") as file:  # a disk may be full, or what hangs
            file.write(f"{text}:\n".encode())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            _write(file.read())  # at one go, so that ranks' stacks do not mix
        end = time.monotonic() + 0.85 * self.grace  # before faulthandler's thread
        if self.roll is not None:
            line = self.roll.report(self.doing, 0.75 * self.grace)
            _write(f"{line}\n".encode())
            text = f"{text}; {line}"
        tell_torchrun(text)
        time.sleep(max(0.0, end - time.monotonic()))
        os._exit(EXIT_CODE)


def _write(text: bytes) -> None:
    """To stderr. A log that takes no more is no reason to go on waiting."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), text)


@contextmanager
def watched(timeout: float, rank: int) -> Iterator[Watchdog]:
    """An error that says that a peer is gone is given a note of who no longer answers."""
    roll = RollCall() if dist.is_initialized() and dist.get_world_size() > 1 else None
    watchdog = Watchdog(timeout, rank, roll)
    watchdog.start()
    try:
        yield watchdog
    except Exception as error:
        watchdog.close()
        if roll is not None and peer_is_gone(error):
            error.add_note(roll.report(watchdog.doing, PATIENCE))
        raise
    finally:
        watchdog.close()
