"""What was written survives a power cut, and what was not is not mistaken for it."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Of a file its bytes, of a directory the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_name(path: Path) -> Path:
    """Beside `path`, a name of this process's own for what will become it."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")
