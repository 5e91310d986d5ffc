"""Several files appear together under their names, or none does: whatever ends the process that writes them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megabus.durable import open_lock, sync
from megabus.errors import UserError, warn

ENDING = ".preprocess"  # of the hidden folder beside the files, in which they are written
LOCK, NEW, WHOLE, OLD = "lock", "new", "whole", "old"  # in that folder


@contextmanager
def all_or_none(prefix: Path, targets: list[Path]) -> Iterator[Path]:
    """A folder to write files into, all of which are moved beside `prefix` when the block succeeds.

    If it raises, or is killed, what lies there stays as it was. What a killed process has left is swept by the next
    one that writes into the same folder, and so is a move that failed halfway and could not be taken back. Raises
    UserError for a target that is a folder, or if another process writes at the same prefix; OSError if the files
    cannot be written.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for target in targets:
        if target.is_dir():
            raise UserError("--out", target, "is a folder", "remove it, or choose another prefix")
    stage = prefix.parent / f".{prefix.name}{ENDING}"
    sweep(prefix.parent, stage)
    stage.mkdir(exist_ok=True)
    if stage.is_symlink():  # to a folder, which is another's
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(stage))
    with open_lock(stage / LOCK) as lock:
        if not _has_locked(lock.fileno(), stage / LOCK, without_locks=True):
            remedy = "wait for it, or choose another prefix"
            raise UserError("--out", prefix, "another preprocess is writing there", remedy)
        try:
            (stage / NEW).mkdir()
            yield stage / NEW
            for file in sorted((stage / NEW).iterdir()):
                sync(file)
            sync(stage / NEW)
            (stage / NEW).rename(stage / WHOLE)  # from here on, what follows is done even if this process is killed
            sync(stage)
            _move_out(stage)
        finally:
            if _has_any(stage / OLD) and _has_any(stage / WHOLE):
                warn(f"{prefix} is half replaced: what was there lies in {stage}; the next preprocess ends the move")
            else:
                _delete(stage)


def sweep(folder: Path, mine: Path) -> None:
    """Finish or delete what killed processes have left in a folder; those that live hold their locks.

    What cannot be swept is told, and left. Of `mine` it raises OSError, since a process is about to write there.
    """
    for lock in sorted(folder.glob(f".*{ENDING}/{LOCK}")):
        try:
            with open_lock(lock) as file:
                if _has_locked(file.fileno(), lock, without_locks=False):
                    if (lock.parent / WHOLE).is_dir():
                        _move_out(lock.parent)
                    _delete(lock.parent)
                    warn(f"swept up after a preprocess that was killed: {lock.parent}")
        except OSError as error:  # another user's, say, or a folder has the name of one of its files
            if lock.parent == mine:
                raise
            warn(f"a killed preprocess has left {lock.parent}, which cannot be swept up ({error})")


def _has_any(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _has_locked(descriptor: int, path: Path, without_locks: bool) -> bool:
    """Take the lock, unless a living process has it. The kernel frees it however a process ends.

    `without_locks`: the answer on a file system that has none.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), path.stat())  # and not one that was just deleted
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:
        return without_locks


def _delete(stage: Path) -> None:
    """Its lock last: a folder without one is empty."""
    for inner in (NEW, WHOLE, OLD):
        if (stage / inner).exists():
            shutil.rmtree(stage / inner)
    shutil.rmtree(stage)


def _move_out(stage: Path) -> None:
    """Move the whole files to their names beside the stage, or on an error none of those that are left."""
    old, folder = stage / OLD, stage.parent
    old.mkdir(exist_ok=True)
    # The index comes last, and the old ones go first: half of a move is no corpus, rather than one of two halves.
    files = sorted((stage / WHOLE).iterdir(), key=lambda file: (file.suffix == ".idx", file.name))
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        moved.append((source, target))

    try:
        for file in files:
            target = folder / file.name
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
            if os.path.lexists(target):
                move(target, old / file.name)
        for file in files:
            move(file, folder / file.name)
    except BaseException:  # a Ctrl-C too
        for source, target in reversed(moved):
            target.rename(source)
        raise
    sync(folder)
