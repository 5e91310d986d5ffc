"""Requests to stop: a signal to any rank, or a file named `stop` in the run's directory."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from deepspeed.accelerator import get_accelerator

from megabus.parallel.agree import on_any_rank

STOP_FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LOOK_EVERY = 1.0  # seconds: a shared file system is not asked at every step


class StoppedError(Exception):
    """All ranks were asked to stop during the start of a run, of which nothing has been done yet."""


class StopRequests:
    """What this rank has heard; that all ranks stop after the same step is the loop's business. Only a rank that
    `looks` asks the file system."""

    def __init__(self, run_dir: Path, looks: bool) -> None:
        self.file, self.looks = run_dir / STOP_FILE, looks
        self.begun = False  # the first step: before it there is nothing to save
        self.reason: str | None = None
        self._looked = 0.0

    def poll(self) -> bool:
        """Whether to stop. A run of short steps hears of the file within a second."""
        now = time.monotonic()
        if self.looks and self.reason is None and now - self._looked >= LOOK_EVERY:
            self._looked = now
            if _exists(self.file):
                self.reason = f"the file {self.file}"
        return self.reason is not None

    def obeyed(self) -> None:
        """The run was saved: the next start must not stop for the same file."""
        self.file.unlink(missing_ok=True)

    def hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self.reason is not None or not self.begun):
            raise KeyboardInterrupt  # from the keyboard during the start, or twice: now
        self.reason = signal.Signals(number).name

    def of_any(self, device: torch.device) -> bool:
        """Whether any rank has been asked. Collective."""
        return on_any_rank([self.poll()], device)[0]

    def check_start(self) -> None:
        """Raise `StoppedError` on all ranks if any has been asked. Collective."""
        if self.of_any(torch.device(get_accelerator().current_device_name())):
            raise StoppedError


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a file system that does not answer now asks for nothing
        return False


@contextmanager
def listening(run_dir: Path, looks: bool) -> Iterator[StopRequests]:
    """Handle the signals until the block ends."""
    requests = StopRequests(run_dir, looks)
    before = {number: signal.signal(number, requests.hear) for number in SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
