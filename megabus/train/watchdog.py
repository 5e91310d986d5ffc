"""Ends a rank that makes no progress, with the stacks of all its threads in the log."""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h
GRACE = 30.0  # seconds between a rank's stacks and its end: time for ranks whose last heartbeat was later


class Watchdog:
    """`heartbeat` must be called at least every `timeout` seconds, or the process ends.

    All ranks of a hung job wait, so all of them tell. A thread of Python watches; should the hung code hold the
    interpreter's lock, faulthandler's own thread, which needs none, does the same a little later.
    """

    def __init__(self, timeout: float, rank: int) -> None:
        self.timeout, self.rank = timeout, rank
        self._beat, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def heartbeat(self) -> None:
        """Progress was made."""
        self._beat.set()
        faulthandler.dump_traceback_later(self.timeout + 2 * GRACE, exit=True)

    def start(self) -> None:
        self.heartbeat()
        self._thread.start()

    def close(self) -> None:
        self._closed = True
        self._beat.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while True:
            self._beat.clear()
            if self._closed:  # looked at after clearing: `close` sets it first
                return
            if not self._beat.wait(self.timeout):
                self._end()

    def _end(self) -> None:
        with tempfile.TemporaryFile() as file:
            file.write(f"rank {self.rank}: no progress for {self.timeout:g} s (faults.hang_timeout):\n".encode())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            os.write(sys.stderr.fileno(), file.read())  # at one go, so that ranks' stacks do not mix
        self._beat.wait(GRACE)
        os._exit(EXIT_CODE)


@contextmanager
def watched(timeout: float, rank: int) -> Iterator[Watchdog]:
    watchdog = Watchdog(timeout, rank)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()
