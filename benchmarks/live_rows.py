"""A run's metrics while they are written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def live_rows(run_dir: str, has_ended: Callable[[], bool], pause: float) -> Iterator[dict[str, Any]]:
    """The rows of a run's metrics, each as soon as its line is whole, until the run has ended. pause: seconds between
    two looks."""
    metrics, read, ended = Path(run_dir) / "metrics.jsonl", 0, False
    while not ended:
        ended = has_ended()
        text = metrics.read_text() if metrics.exists() else ""
        whole = text.rfind("\n") + 1
        yield from map(json.loads, text[read:whole].splitlines())
        read = max(read, whole)
        time.sleep(pause)
