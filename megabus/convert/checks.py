"""Checks of a source's files that go on in threads while what they hold is converted, since hashing takes as long.

Nothing appears under its name before they have ended, so what is damaged is refused as it would be before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from megabus.checkpoint.manifest import THREADS


class Checks:
    """Calls that raise where something is wrong, made side by side; leaving the `with` block waits for them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "check")
        self._going_on: list[Future[Any]] = []

    def submit(self, check: Callable[..., object], *args: Any) -> None:
        self._going_on.append(self._pool.submit(check, *args))

    def wait(self) -> None:
        """Until all have ended. Raises what the first one that was submitted has raised."""
        for each in self._going_on:
            each.result()

    @contextmanager
    def first(self) -> Iterator[None]:
        """Wait for them at the block's end. If the block fails, what they find is told instead: it may be why."""
        try:
            yield
        except Exception:
            self.wait()
            raise
        self.wait()

    def __enter__(self) -> Checks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(cancel_futures=True)
