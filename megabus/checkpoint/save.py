"""Save a running engine: copy its state aside, then write while training goes on."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megabus.checkpoint.host_memory import HostMemory
from megabus.checkpoint.manifest import Entry, Heartbeat, idle, settle
from megabus.checkpoint.state import Progress, SavedState, write_state
from megabus.checkpoint.store import begin, checkpoints_of, folder_of, partial_of, prune, publish
from megabus.data.tokenizer import TokenizerFiles, read_tokenizer_files
from megabus.errors import UserError
from megabus.parallel.agree import agreement
from megabus.parallel.fragments import Fragments
from megabus.parallel.placement import Placement

if TYPE_CHECKING:
    from megabus.engine.engine import Engine

BEHIND_TRAINING = 5  # niceness of what writes while ranks compute: of a core that both want it takes a quarter
SLOWEST = timedelta(days=1)  # that a rank may take to write: whether that is too long is the watchdog's business


@dataclass(frozen=True)
class Snapshot:
    """A run at a step boundary, on the CPU and nobody else's: what training does next does not change it."""

    state: SavedState
    placement: Placement
    fragments: Fragments

    @classmethod
    def take(cls, state: SavedState, placement: Placement, live: Fragments, memory: HostMemory) -> Snapshot:
        return cls(state, placement, memory.copies(live))


@dataclass
class Save:
    """One save, going on or ended. stall_s is what training waited for, write_s what the writing took; `bytes` of all
    files together, on rank 0."""

    step: int
    stall_s: float = 0.0
    write_s: float = 0.0
    bytes: int = 0
    folder: Path | None = None
    error: UserError | None = None
    crash: BaseException | None = None


def writing_group() -> dist.ProcessGroup:
    """A gloo group for one writer at a time: its messages never meet those of training or of another writer. Make few,
    for each has threads and sockets until the process ends. Collective."""
    return dist.new_group(backend="gloo", timeout=SLOWEST)


class Saver:
    """Writes the checkpoints of a run, one at a time. Collective: every rank makes every call.

    tokenizer: what goes into each, given by name or as it was read; rank 0's counts. group: of `writing_group`, for
    nothing else while a save goes on; left out, the saver makes one. Raises `UserError` on all ranks for a tokenizer
    that cannot be read.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int,
        keep_every: int | None,
        asynchronous: bool,
        tokenizer: str | Path | TokenizerFiles | None,
        heartbeat: Heartbeat = idle,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.root, self.keep_last, self.keep_every = root, keep_last, keep_every
        self.asynchronous, self.heartbeat = asynchronous, heartbeat
        self.tokenizer: TokenizerFiles | None = None
        with agreement():  # else the other ranks would wait for rank 0 in what comes next
            if isinstance(tokenizer, TokenizerFiles):
                self.tokenizer = tokenizer
            elif tokenizer is not None and dist.get_rank() == 0:  # once: what lies there later may be another
                self.tokenizer = read_tokenizer_files(tokenizer)
        self.group = writing_group() if group is None else group
        self._thread: threading.Thread | None = None
        self._save: Save | None = None
        self._memory = HostMemory()  # one save goes on at a time
        self._prepared = False

    def prepare(self, read: Callable[[], Fragments]) -> None:
        """Import what writing takes, a second of processor time, and have memory for what `read` returns. Call it after
        each step, of which the first need not wait, and so before the first save, whose thread should not import while
        training runs. Collective."""
        import megabus.checkpoint.shards  # noqa: F401

        if not self._prepared:
            self._prepared = True
            self._reserve(read())

    def _reserve(self, live: Fragments) -> None:
        """On every rank, or on none: were one to end for want of memory, the others would wait for it."""
        with agreement():
            self._memory.reserve(live)

    def start(self, state: SavedState, placement: Placement, live: Fragments) -> None:
        """Begin a save; call `wait` first. Without `asynchronous` it has ended on return."""
        assert self._save is None
        begun = time.perf_counter()
        save = self._save = Save(state.progress.step)
        self._reserve(live)  # a growth asks for more
        snapshot = Snapshot.take(state, placement, live, self._memory)
        self._thread = threading.Thread(target=self._run, args=(snapshot, save), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.asynchronous:
            self._thread.join()
        save.stall_s = time.perf_counter() - begun

    def wait(self) -> Save | None:
        """The save that was going on, ended; None if there was none."""
        begun = time.perf_counter()
        if self._thread is None or self._save is None:
            return None
        self._thread.join()
        save, self._thread, self._save = self._save, None, None
        save.stall_s += time.perf_counter() - begun
        if save.crash is not None:
            raise save.crash
        return save

    @property
    def ended(self) -> bool:
        """Whether `wait` would return a save at once, as far as this rank knows."""
        return self._thread is not None and not self._thread.is_alive()

    def let_end(self, seconds: float) -> None:
        """Before the process ends with an error: let a save that is going on become a checkpoint."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self, snapshot: Snapshot, save: Save) -> None:
        begun = time.perf_counter()
        if self.asynchronous and sys.platform == "linux":  # where it is this thread's, and of those that it starts
            os.nice(BEHIND_TRAINING)
        try:
            save.folder, save.bytes = self._write(snapshot)
        except UserError as error:
            save.error = error
        except BaseException as error:  # raised again by `wait`, in the main thread
            save.crash = error
        save.write_s = time.perf_counter() - begun

    def _write(self, snapshot: Snapshot) -> tuple[Path, int]:
        """All ranks raise one `UserError` if any cannot write; then nothing half-written is left."""
        rank, step = dist.get_rank(), snapshot.state.progress.step
        try:
            with self._together(step):
                if rank == 0:
                    begin(self.root, step)
            from megabus.checkpoint.shards import write_shards

            partial = partial_of(self.root, step)
            with self._together(step):
                what = (snapshot.placement, snapshot.fragments, snapshot.state.kinds)
                files = write_shards(partial, *what, self.group, self.heartbeat)
                rest = self._write_rest(partial, snapshot.state) if rank == 0 else []
                mine = [settle(path, rank, self.heartbeat, digest) for path, digest in files.items()]
                mine += [settle(path, rank, self.heartbeat) for path in rest]
            entries: list[list[Entry]] = [[] for _ in range(dist.get_world_size())]
            dist.gather_object(mine, entries if rank == 0 else None, group=self.group)
            written = [entry for part in entries for entry in part]
            with self._together(step):
                if rank == 0:
                    publish(partial, written)
        except UserError:
            if rank == 0:
                shutil.rmtree(partial_of(self.root, step), ignore_errors=True)
            raise
        if rank == 0:
            prune(self.root, self.keep_last, self.keep_every)
        return folder_of(self.root, step), sum(entry.bytes for entry in written)

    @contextmanager
    def _together(self, step: int) -> Iterator[None]:
        """A failure of any rank's file system is a `UserError` of all ranks."""
        problem, remedy = "cannot be written", "make room or choose another run_dir"
        with agreement(self.group):
            try:
                yield
            except OSError as error:
                raise UserError("checkpoint", folder_of(self.root, step), f"{problem} ({error})", remedy) from error

    def _write_rest(self, partial: Path, state: SavedState) -> list[Path]:
        files = [write_state(partial, state)]
        if self.tokenizer is not None:
            files += self.tokenizer.write(partial)
        return files


def save_weights(
    folder: Path,
    engine: Engine,
    steps: int,
    config: dict[str, Any],
    tokenizer: TokenizerFiles,
    group: dist.ProcessGroup | None = None,
) -> Path | None:
    """Write an engine's weights, without moments, as a run's only checkpoint, of `steps` steps; `config`: sections that
    it is told to have been made with. group: as `Saver`'s; who calls this more than once gives it. Collective. Raises
    `UserError` on all ranks where it cannot be written."""
    saver = Saver(checkpoints_of(folder), 1, None, False, tokenizer, group=group)
    model, layout = engine.stage.model, engine.stage.layout
    state = SavedState(Progress(step=steps), 0, model, layout, 0, ("weight",), {}, config, {})
    saver.start(state, engine.placement, engine.read())
    save = saver.wait()
    assert save is not None
    if save.error is not None:
        raise save.error
    return save.folder
