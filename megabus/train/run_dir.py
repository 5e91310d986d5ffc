"""A run's directory: who may write into it, and what an earlier start has left there."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import uuid
from itertools import count
from pathlib import Path
from typing import IO

import torch.distributed as dist
import yaml

from megabus.checkpoint.contents import Found
from megabus.checkpoint.store import checkpoints_of, sweep
from megabus.config import RunConfig
from megabus.durable import open_lock
from megabus.errors import UserError, say, warn
from megabus.parallel.agree import agreement, rank_0_tells
from megabus.plain_file import NotPlainError, read_regular
from megabus.train.metrics import SINKS, Metrics

LOCK = ".lock"


def check_shared(run_dir: Path) -> None:
    """Raise `UserError` on all ranks unless all see the same directory and may write into it: each rank writes its own
    part of checkpoints. Collective."""

    def write() -> str:
        token = uuid.uuid4().hex
        try:
            (run_dir / LOCK).write_text(token)
        except OSError as error:
            raise _unwritable(run_dir, error) from error
        return token

    token = rank_0_tells(write)
    with agreement():
        try:
            seen = (run_dir / LOCK).read_text()
        except OSError:
            seen = ""
        if seen != token:
            problem = f"is not the same directory on rank {dist.get_rank()} as on rank 0"
            raise UserError("run_dir", run_dir, problem, "put it on a file system that all nodes share")
        try:
            with tempfile.TemporaryFile(dir=run_dir):
                pass
        except OSError as error:
            raise _unwritable(run_dir, error, f" by rank {dist.get_rank()}") from error


class RunLock:
    """One run at a time writes into a run_dir. The kernel frees the lock however the process ends."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.path = run_dir, run_dir / LOCK
        self._file: IO[str] | None = None
        self._made: list[Path] = []  # what was not there before: the lock, then its directories, the innermost first

    def acquire(self) -> None:
        """Make the directory, and take the lock. Raises `UserError` if another run has it."""
        try:
            absent = [path for path in (self.path, *self.path.parents) if not path.exists()]
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._file = open_lock(self.path)
        except OSError as error:
            raise _unwritable(self.run_dir, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_there():  # a run that was refused has just removed the file
                raise BlockingIOError
            self._made = absent  # who has the lock may undo it
        except BlockingIOError as error:
            remedy = "wait for it, or choose another"
            raise UserError("run_dir", self.run_dir, "is in use by another run", remedy) from error
        except OSError as error:  # some file systems have none
            warn(f"{self.run_dir} cannot be locked ({error.strerror}): see that no second run uses it")

    def _is_there(self) -> bool:
        """Whether the file that is locked is the one that another run would lock."""
        assert self._file is not None
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def keep(self) -> None:
        """The run is not refused: what was made for it stays."""
        self._made = []

    def release(self) -> None:
        """Free the lock. What `acquire` made for a run that was refused goes, before another run can have the lock."""
        with contextlib.suppress(OSError):  # another's file is there: so is the directory
            for path in self._made:
                path.rmdir() if path.is_dir() else path.unlink()
        if self._file is not None:
            self._file.close()


def _unwritable(run_dir: Path, error: OSError, by: str = "") -> UserError:
    return UserError("run_dir", run_dir, f"cannot be written{by} ({error.strerror})", "choose a writable place")


def open_metrics(config: RunConfig, found: Found | None) -> Metrics:
    """Write down the configuration, and open the metrics: behind those of the run that `found` belongs to, or anew."""
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's is four times as fast, where PyYAML has it
    path, text = Path(config.run_dir), yaml.dump(config.model_dump(mode="json"), Dumper=dumper, sort_keys=False)
    try:
        swept = sweep(checkpoints_of(path))
        if swept:
            say(f"deleted what a killed run left half-written: {', '.join(file.name for file in swept)}")
        kept = path / "config.yaml"
        if found is None:  # else two runs would be one curve
            _set_aside(*(path / name for name in SINKS))
        if found is None or not _says(kept, text):
            _set_aside(kept)
            kept.write_text(text, encoding="utf-8")
        return Metrics(config, None if found is None else found.state.progress.step)
    except OSError as error:
        raise _unwritable(path, error) from error


def _says(file: Path, text: str) -> bool:
    """Whether it is a file with this text. What else is there, and how it is encoded, is its owner's."""
    try:
        return read_regular(file, links=True) == text.encode()
    except (FileNotFoundError, NotPlainError):
        return False


def _set_aside(*files: Path) -> None:
    """Keep what an earlier start has left, under the first number that is free for all of it."""

    def kept(file: Path, number: int) -> Path:
        return file.with_name(f"{file.stem}-{number}{file.suffix}")

    left = [file for file in files if os.path.lexists(file)]
    number = next(number for number in count(1) if not any(os.path.lexists(kept(file, number)) for file in files))
    for file in left:
        file.rename(kept(file, number))
