"""Damaged files and full disks: what is damaged is found and named, and what has no room costs no checkpoint."""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from megabus.testing.chaos import Workload, losses, newest_whole
from megabus.testing.chaos_ranks import WORLD, Attempt, Board, attempt
from megabus.testing.chaos_runs import SAVE_EVERY
from megabus.testing.ranks import run_ranks

# ---- damage

FILES = {
    "weights": "shard-*-00001-of-*.safetensors",
    "first moments": "shard-*-00002-of-*.safetensors",
    "second moments": "shard-*-00003-of-*.safetensors",
    "state.json": "state.json",
    "manifest.json": "manifest.json",
    "tokenizer.model": "tokenizer.model",
    "latest": "",
}
BLOCK = 256  # bytes that are zeroed together, at most


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit of one byte."""
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def zero(data: bytes, rng: random.Random) -> bytes:
    """A block that held something."""
    changed = data
    while changed == data:
        start = rng.randrange(len(data))
        length = min(rng.randint(1, BLOCK), len(data) - start)
        changed = data[:start] + bytes(length) + data[start + length :]
    return changed


def leave(data: bytes, rng: random.Random) -> bytes:
    """No damage at all: no alarm may be given."""
    return data


HOW: dict[str, Callable[[bytes, random.Random], bytes] | None] = {
    "bit flip": flip,
    "truncation": cut,
    "zeroed block": zero,
    "deletion": None,
}


@dataclass(frozen=True)
class Damage:
    """A file of a run's newest checkpoint, by its kind and its path below `checkpoints`, and what is done to it."""

    kind: str
    file: str
    how: str
    seed: int


@dataclass(frozen=True)
class Finding:
    """What `find_checkpoint` made of a damaged file. `resume: auto` must tell its name and take the newest good
    checkpoint; `resume: strict` must refuse (whether it names the same file is told too)."""

    damage: Damage
    named: bool
    right: bool
    refused: bool
    strict_named: bool

    @property
    def detected(self) -> bool:
        return self.named and self.right and self.refused


def damages(root: Path, count: int, rng: random.Random, first: int = 0) -> list[Damage]:
    """Cases over every kind of file that there is, and every kind of damage, in turn, from the `first` on."""
    newest = sorted(root.glob("step-*[0-9]"))[-1]
    pairs = [(kind, how) for how in HOW for kind in FILES]
    cases = []
    for number in range(first, first + count):
        kind, how = pairs[number % len(pairs)]
        files = sorted(newest.glob(FILES[kind])) if FILES[kind] else [root / "latest"]
        cases.append(Damage(kind, str(rng.choice(files).relative_to(root)), how, rng.randrange(2**32)))
    return cases


def find_damages(root: Path, scratch: Path, cases: Sequence[Damage]) -> list[Finding]:
    """Damage a copy of `root` in each way, and look for a checkpoint there as a starting run does. In a forked rank."""
    return run_ranks(1, _find_damages, root, scratch, cases, timeout=300.0)[0]


def _find_damages(root: Path, scratch: Path, cases: Sequence[Damage]) -> list[Finding]:
    return [_find(root, scratch, case) for case in cases]


def _find(root: Path, scratch: Path, case: Damage) -> Finding:
    from megabus.checkpoint.manifest import DamagedError
    from megabus.checkpoint.restore import find_checkpoint

    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(root, scratch)
    path, spoil = scratch / case.file, HOW.get(case.how, leave)
    if spoil is None:
        path.unlink()
    else:
        path.write_bytes(spoil(path.read_bytes(), random.Random(case.seed)))
    folders = sorted(scratch.glob("step-*[0-9]"))
    refused = strict_named = False
    try:
        find_checkpoint(scratch, strict=True)
    except DamagedError as error:
        refused, strict_named = True, str(error.value) == str(path)
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        found = find_checkpoint(scratch, strict=False)
    right = found is not None and found.folder == folders[-1 if case.kind == "latest" else -2]
    return Finding(case, f" = {path}: " in stderr.getvalue(), right, refused, strict_named)


# ---- a full disk


class Disk(Protocol):
    """A place for a run that a rank can fill up and make room on. Called on every rank at the same step."""

    name: str
    folder: Path
    victim: int  # a rank that cannot write when it is full

    def fill(self, rank: int) -> None: ...

    def free(self, rank: int) -> None: ...

    def empty(self) -> None:
        """Make room from outside of the run."""


class TmpDisk:
    """A small file system of its own: full when rank 0 has written a file as large as the room that was left."""

    name, victim = "tmpfs", 0
    megabytes = 16

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def ballast(self) -> Path:
        return self.folder / "ballast"

    def fill(self, rank: int) -> None:
        if rank == 0:
            with contextlib.suppress(OSError), self.ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))

    def free(self, rank: int) -> None:
        if rank == 0:
            self.empty()

    def empty(self) -> None:
        self.ballast.unlink(missing_ok=True)


class NoFiles:
    """Where no file system can be mounted: the kernel refuses one rank every write to a file. (Python ignores the
    signal that comes with it, and sees an OSError as on a full disk.)"""

    def __init__(self, folder: Path, victim: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.victim, self.name = folder, victim, f"rlimit, rank {victim}"

    def fill(self, rank: int) -> None:
        self._limit(rank, 0)

    def free(self, rank: int) -> None:
        self._limit(rank, resource.getrlimit(resource.RLIMIT_FSIZE)[1])

    def empty(self) -> None:
        """A rank that starts anew has no limit."""

    def _limit(self, rank: int, size: int) -> None:
        if rank == self.victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[TmpDisk | None]:
    """A tmpfs at `folder`; None where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={TmpDisk.megabytes}m", "chaos", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield TmpDisk(folder)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass
class FullDisk:
    """What a run did on a full disk: a row of the table. `kept`: the checkpoint that was there all the time."""

    case: str
    disk: str
    ending: str
    failed_saves: int
    waited: bool  # whether rows of metrics.jsonl had to wait for room
    kept: int | None
    problems: list[str] = field(default_factory=list)


FULL_AT, ROOM_AT = 6, 14  # steps after which the disk is full, and has room again


def room_is_made(workload: Workload, disk: Disk) -> FullDisk:
    """Full in the middle of a run, with room again before its end: the run ends well and is the undisturbed one."""
    run_dir, run = _start(workload, disk, "room", "continue", ROOM_AT)
    row = _row("continue, room is made", disk, run, run_dir)
    if not run.done:
        row.problems.append(f"did not finish: {run.ending()}")
    else:
        row.problems += losses(workload.remains, run_dir)
    if not row.failed_saves:
        row.problems.append("no save failed")
    if not row.waited and disk.victim == 0:
        row.problems.append("metrics.jsonl was always written")
    return row


def no_room_is_made(workload: Workload, disk: Disk) -> FullDisk:
    """Full to the end: all steps are made, the exit tells, the old checkpoint is whole; with room the run goes on."""
    run_dir, run = _start(workload, disk, "full", "continue", None)
    row = _row("continue, no room", disk, run, run_dir)
    steps = {run.board.step(rank) for rank in range(WORLD)}
    if steps != {workload.last_step}:
        row.problems.append(f"stopped training at {steps}")
    _expect_error(row, run)
    _go_on(workload, disk, run_dir, row)
    return row


def stop_at_once(workload: Workload, disk: Disk) -> FullDisk:
    """`on_error: stop`: every rank ends with an error soon after, the old checkpoint is whole, the run goes on."""
    run_dir, run = _start(workload, disk, "stop", "stop", None)
    row = _row("stop", disk, run, run_dir)
    late = max(run.board.step(rank) for rank in range(WORLD)) - FULL_AT
    if late > 2 * SAVE_EVERY:
        row.problems.append(f"stopped {late} steps after the disk was full")
    _expect_error(row, run)
    _go_on(workload, disk, run_dir, row)
    return row


FULL_DISK_CASES = (room_is_made, no_room_is_made, stop_at_once)


def _start(workload: Workload, disk: Disk, name: str, on_error: str, room_at: int | None) -> tuple[Path, Attempt]:
    run_dir = disk.folder / name
    config = workload.config(run_dir, on_error=on_error)

    def prepare(rank: int, board: Board) -> None:
        loop: Any = import_module("megabus.train.loop")
        train_step, warn_unwritten = loop.train_step, loop.warn_unwritten

        def step(run: Any) -> None:
            if run.progress.step == FULL_AT:
                disk.fill(rank)
            elif run.progress.step == room_at:
                disk.free(rank)
            train_step(run)

        def warned(run: Any) -> None:
            board.note(rank)
            warn_unwritten(run)

        loop.train_step, loop.warn_unwritten = step, warned

    return run_dir, attempt(config, None, prepare=prepare)  # a log would not be writable either


def _row(case: str, disk: Disk, run: Attempt, run_dir: Path) -> FullDisk:
    newest, torn = newest_whole(run_dir / "checkpoints")
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    failed = sum('"event": "save"' in line and '"error": null' not in line for line in rows)
    row = FullDisk(case, disk.name, run.ending(), failed, run.board.noted(0), newest)
    row.problems += [f"{name} is not whole" for name in torn]
    if newest is None or newest < FULL_AT - 2:
        row.problems.append(f"the newest checkpoint is that of step {newest}")
    return row


def _expect_error(row: FullDisk, run: Attempt) -> None:
    if {end.how for end in run.ends} != {"UserError"} or "cannot be written" not in run.ends[0].text:
        row.problems.append(f"is no clean end: {run.ending()}")


def _go_on(workload: Workload, disk: Disk, run_dir: Path, row: FullDisk) -> None:
    """Make room, start again, and compare the end with the undisturbed run's."""
    disk.empty()
    run = attempt(workload.config(run_dir), None)
    if run.began != {row.kept}:
        row.problems.append(f"went on from {run.began}, the checkpoint of step {row.kept} was there")
    if not run.done:
        row.problems.append(f"did not finish with room: {run.ending()}")
    else:
        row.problems += losses(workload.remains, run_dir)
