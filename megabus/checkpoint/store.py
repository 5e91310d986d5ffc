"""The directory of a run's checkpoints: how one appears, which is the newest, and which are deleted.

    RUN_DIR/checkpoints/step-00000120/     complete, never changed again
                        step-00000160.partial/   being written, or left by a killed run: never read
                        step-00000140.damaged/   set aside by a resume that found it damaged
                        latest                   the newest one's name and its manifest's SHA-256

A checkpoint appears by one rename of a directory whose files are all on disk; `latest` moves after that, and older
ones are deleted after that. So at every instant the newest complete checkpoint is whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megabus.checkpoint.manifest import DamagedError, Entry, digest_of, settle, write_manifest
from megabus.durable import sync
from megabus.errors import UserError, warn
from megabus.plain_file import NotPlainError, read_regular

LATEST = "latest"
LONGEST = 1024  # bytes of it
_NAME = re.compile(r"step-(\d{8,})")


def checkpoints_of(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def partial_of(root: Path, step: int) -> Path:
    return folder_of(root, step).with_suffix(".partial")


def step_of(folder: Path) -> int | None:
    """The step of a complete checkpoint's directory; None for anything else."""
    match = _NAME.fullmatch(folder.name)
    step = int(match[1]) if match else None
    return None if step is None or folder != folder_of(folder.parent, step) else step  # one name a step


def complete(root: Path) -> list[Path]:
    """The checkpoints that are complete by name, newest first."""
    try:
        found = list(root.iterdir()) if root.is_dir() else []
    except OSError as error:
        raise UserError("checkpoint", root, f"cannot be read ({error.strerror})", "mend the file system") from error
    return sorted((path for path in found if step_of(path) is not None), key=lambda p: step_of(p) or 0, reverse=True)


def begin(root: Path, step: int) -> Path:
    """An empty directory to write the checkpoint of `step` into."""
    partial = partial_of(root, step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def publish(partial: Path, entries: Sequence[Entry]) -> Path:
    """Let a directory whose files are settled appear under its name, and point `latest` at it.

    Raises OSError if a file of another rank is not there as that rank measured it: no shared file system.
    """
    for entry in entries:
        found = (partial / entry.name).stat().st_size
        if found != entry.bytes:
            raise OSError(f"{entry.name} has {found} bytes here, {entry.bytes} where rank {entry.rank} wrote it")
    settle(write_manifest(partial, entries), rank=0)
    sync(partial)
    folder = partial.with_suffix("")
    if folder.exists():  # it appeared, but `latest` could not be moved: the disk was full
        shutil.rmtree(partial)
    else:
        partial.rename(folder)
    sync(folder.parent)
    point_latest(folder)
    return folder


def point_latest(folder: Path) -> None:
    path = folder.parent / LATEST
    with contextlib.suppress(FileNotFoundError, NotPlainError):  # what is no file gives way to one
        if read_regular(path, LONGEST) == _pointer(folder).encode():
            return
    fresh = path.with_suffix(".partial")
    fresh.write_text(_pointer(folder))
    settle(fresh, rank=0)
    fresh.replace(path)
    sync(folder.parent)


def latest_of(root: Path) -> Path:
    """What `latest` names. Raises `DamagedError` unless it is a checkpoint with the manifest that it appeared with."""
    path = root / LATEST
    try:
        text = read_regular(path, LONGEST)
        folder = root / text.partition(b" ")[0].decode()
        whole = step_of(folder) is not None and text == _pointer(folder).encode()
    except (OSError, ValueError):
        whole = False
    if not whole:
        problem = "is missing, damaged, or names a checkpoint that is"
        raise DamagedError(path, problem, "resume=auto takes the newest good checkpoint")
    return folder


def _pointer(folder: Path) -> str:
    return f"{folder.name} {digest_of(folder)}\n"


def prune(root: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all complete checkpoints but the newest `keep_last`, and those whose step `keep_every` divides. What
    cannot be deleted is told, and tried again the next time."""
    try:
        older = complete(root)[keep_last:]
    except UserError as error:
        warn(str(error))
        return
    for folder in older:
        step = step_of(folder)
        if keep_every is None or step is None or step % keep_every:
            remove(folder)


def remove(folder: Path) -> None:
    """Delete a directory; killed in the middle, it is no checkpoint any more."""
    try:
        gone = folder.with_suffix(".deleted")
        if os.path.lexists(gone):
            _delete(gone)
        _delete(folder.rename(gone))
    except OSError as error:
        warn(f"{folder} cannot be deleted ({error})")


def sweep(root: Path) -> list[Path]:
    """Delete what a killed run has left half-written or half-deleted; what was deleted."""
    found = [path for path in root.iterdir() if path.suffix in (".partial", ".deleted")] if root.is_dir() else []
    for path in found:
        try:
            _delete(path)
        except OSError as error:
            warn(f"{path} cannot be deleted ({error})")
    return found


def _delete(path: Path) -> None:
    """A directory with all in it. Of a link only the link: what it leads to is another's to keep."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def set_aside(folder: Path) -> Path:
    """Keep a damaged checkpoint for its owner to look at, where no resume looks for one."""
    target, number = folder.with_suffix(".damaged"), 1
    while os.path.lexists(target):
        target, number = folder.with_suffix(f".damaged-{number}"), number + 1
    return folder.rename(target)
