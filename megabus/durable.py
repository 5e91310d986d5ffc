"""There is a place to write to; what was written survives a power cut, and what was not is not mistaken for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from megabus.errors import UserError


def sync(path: Path) -> None:
    """Of a file its bytes, of a directory the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_lock(path: Path) -> IO[str]:
    """A file to be locked, made where there is none. Raises OSError for a pipe, whose reader it would wait for."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    return os.fdopen(os.open(path, flags, 0o666), "a")


def partial_name(path: Path) -> Path:
    """Beside `path`, a name of this process's own for what will become it."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def make_directory(key: str, path: Path) -> list[Path]:
    """Make it and all above it; those that were not there before, the innermost first. Raises `UserError` about `key`
    where it cannot be made."""
    try:
        absent = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(key, path, f"cannot be written ({error.strerror})", "choose a writable place") from error
    return absent
