"""Ranks that can be killed at a chosen instant: what each is doing stands in memory that outlives it.

Every rank tells its phase through wrappers around the trainer's own functions, put there in the forked process only.
The parent reads along, kills ranks in the middle of a wanted phase, and afterwards reads what they were really doing.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megabus.config import RunConfig
from megabus.engine.startup import start_distributed, stop_distributed
from megabus.errors import UserError
from megabus.testing.ranks import free_port, preload

WORLD = 4
POLL = 0.001  # seconds between two looks at what ranks are doing
NAP = 0.02  # seconds that a phase too short to be met is stretched by, where it is aimed at
GROUP_TIMEOUT = 12.0  # seconds that ranks wait for each other
LIMIT = 5 * GROUP_TIMEOUT + 10  # seconds for a killed rank's fellows to end: gloo tries five times to form a group
ATTEMPT_TIMEOUT = 240.0  # seconds that nothing here takes unless it hangs


class Phase(IntEnum):
    """What a thread of a rank is in the middle of. Those from WRITE on are the background writer's."""

    OUT = 0  # nothing of the below
    JOIN = 1  # meeting the other ranks
    START = 2  # reading data and finding the checkpoint, building the first engine
    RESTORE = 3
    STEP = 4
    VALIDATE = 5
    MOVE = 6  # growth: redistributing and growing the weights
    BUILD = 7  # growth: the old engine closes, the new one is built and filled
    GROWN = 8  # growth: after it, before its checkpoint begins
    SAVE = 9  # waiting for the save before, copying
    FINISH = 10  # the last save
    WRITE = 11  # in the background: agreeing with other ranks
    SHARDS = 12
    PUBLISH = 13  # rank 0: up to the rename that makes the checkpoint appear
    LATEST = 14  # rank 0: between that rename and the moved `latest`
    PRUNE = 15  # rank 0: deleting older ones

    @property
    def in_background(self) -> bool:
        return self >= Phase.WRITE

    @property
    def text(self) -> str:
        prefix = "grow: " if self in ON_GROWTH else "save: " if self > Phase.WRITE else ""
        return "-" if self is Phase.OUT else prefix + self.name.lower()


ON_START = (Phase.JOIN, Phase.START, Phase.RESTORE)
ON_GROWTH = (Phase.MOVE, Phase.BUILD, Phase.GROWN)
NAPS = {Phase.PUBLISH: 1, Phase.LATEST: 1, Phase.PRUNE: 1}  # within the phase, beside the one at its beginning
ONLY_RANK_0 = tuple(NAPS)
_MAIN, _WRITER, _STEP, _SAVING, _BEGAN, _NOTED, _SINCE, _SPENT = 0, 1, 2, 3, 4, 5, 6, 8
_ROW = _SPENT + 2 * len(Phase)


class Board:
    """A row of numbers for each rank, in memory that all processes share."""

    def __init__(self, world: int) -> None:
        self._cells = memoryview(mmap.mmap(-1, 8 * world * _ROW)).cast("q")
        self.world = world

    def _cell(self, rank: int, column: int) -> int:
        return int(self._cells[rank * _ROW + column])

    def _set(self, rank: int, column: int, value: int) -> None:
        self._cells[rank * _ROW + column] = value

    def phase(self, rank: int, in_background: bool) -> Phase:
        return Phase(self._cell(rank, _WRITER if in_background else _MAIN))

    def step(self, rank: int, in_background: bool = False) -> int:
        """The step that the rank's training, or its writer, is at."""
        return self._cell(rank, _SAVING if in_background else _STEP)

    def began(self, rank: int) -> int | None:
        """The step that the rank's training went on from; None if it was not started yet."""
        return self._cell(rank, _BEGAN) - 1 if self._cell(rank, _BEGAN) else None

    def noted(self, rank: int) -> bool:
        return bool(self._cell(rank, _NOTED))

    def text(self, rank: int) -> str:
        """Training's phase and the writer's, as in `step + save: shards`."""
        phases = [self.phase(rank, in_background) for in_background in (False, True)]
        return " + ".join(phase.text for phase in phases if phase is not Phase.OUT) or "-"

    def span(self, phase: Phase) -> float:
        """Seconds that a rank is in the phase at a time, the mean over all ranks."""
        spent = sum(self._cell(rank, _SPENT + 2 * phase) for rank in range(self.world))
        times = sum(self._cell(rank, _SPENT + 2 * phase + 1) for rank in range(self.world))
        return spent / max(times, 1) / 1e9

    # ---- the ranks' side

    def enter(self, rank: int, phase: Phase, in_background: bool) -> None:
        column, now = _WRITER if in_background else _MAIN, time.monotonic_ns()
        before, since = Phase(self._cell(rank, column)), self._cell(rank, _SINCE + column)
        self._set(rank, column, phase)
        self._set(rank, _SINCE + column, now)
        if since:
            spent = _SPENT + 2 * before
            self._set(rank, spent, self._cell(rank, spent) + now - since)
            self._set(rank, spent + 1, self._cell(rank, spent + 1) + 1)

    def tell_step(self, rank: int, step: int, in_background: bool = False) -> None:
        self._set(rank, _SAVING if in_background else _STEP, step)

    def tell_began(self, rank: int, step: int) -> None:
        self._set(rank, _BEGAN, step + 1)
        self._set(rank, _STEP, step)

    def note(self, rank: int) -> None:
        """Something that the caller of `attempt` waits for has come about."""
        self._set(rank, _NOTED, 1)


@dataclass(frozen=True)
class Aim:
    """Kill `victims` in the middle of a phase: the first time a rank is in it at `step` or later, `share` of the
    phase's usual length after its beginning."""

    phase: Phase
    step: int
    share: float
    victims: tuple[int, ...]

    @property
    def watched(self) -> int:
        return 0 if self.phase in ONLY_RANK_0 else self.victims[0]


@dataclass(frozen=True)
class End:
    """How a rank ended: done (what `train` returned), UserError, failed (any other error), killed, or hung."""

    how: str
    text: str = ""


@dataclass(frozen=True)
class Blow:
    """A kill that was dealt: what the watched rank was really doing, whether that was the aim, and at which step."""

    real: str
    hit: bool
    step: int
    seconds: float  # until the last of the others had ended


@dataclass(frozen=True)
class Attempt:
    """One start of a run, up to its end or its kill."""

    ends: list[End]
    board: Board
    blow: Blow | None

    @property
    def done(self) -> bool:
        return all(end.how == "done" for end in self.ends)

    @property
    def began(self) -> set[int | None]:
        """The steps that ranks went on from: one, if all is well."""
        return {self.board.began(rank) for rank in range(self.board.world)}

    def ending(self) -> str:
        texts = {f"{end.how}: {end.text.strip().splitlines()[-1]}" if end.text else end.how for end in self.ends}
        return " | ".join(sorted(texts))


Prepare = Callable[[int, Board], None]
Spans = dict[Phase, float]


def prepare_parent() -> None:
    """Import once all that ranks need, so that a fork is all a start costs."""
    preload()
    import megabus.train.loop  # noqa: F401


def attempt(
    config: RunConfig,
    log: Path | None,
    aim: Aim | None = None,
    spans: Spans | None = None,
    limit: float = LIMIT,
    prepare: Prepare | None = None,
) -> Attempt:
    """Start the run on 4 forked ranks, kill those that `aim` says, wait until the others have ended by themselves.

    Ranks that have not after `limit` seconds are killed and told as hung. `prepare(rank, board)` is called in each
    rank before training. Without an aim, the run goes to its end. `log` None: what ranks print is lost.
    """
    board, port, context = Board(WORLD), free_port(), get_context("fork")
    folder = Path(tempfile.mkdtemp(prefix="chaos-ends-"))
    args = (port, folder, config, board, log, aim, prepare)
    ranks = [context.Process(target=_rank, args=(rank, *args), daemon=True) for rank in range(WORLD)]
    sys.stdout.flush()
    for process in ranks:
        process.start()
    blow, hung, deadline = None, set[int](), time.monotonic() + ATTEMPT_TIMEOUT
    try:
        struck = aim is not None and _strike(board, ranks, aim, spans or {}, deadline)
        struck_at = time.monotonic()
        if struck:
            deadline = struck_at + limit
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            time.sleep(POLL)
        hung = {rank for rank, process in enumerate(ranks) if process.is_alive()}
        if struck and aim is not None:
            blow = _blow(board, aim, time.monotonic() - struck_at)
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
    victims = aim.victims if blow is not None and aim is not None else ()
    ends = [
        End("hung") if rank in hung else _end(folder, rank, rank in victims, ranks[rank].exitcode)
        for rank in range(WORLD)
    ]
    shutil.rmtree(folder)
    return Attempt(ends, board, blow)


def _strike(board: Board, ranks: list[Any], aim: Aim, spans: Spans, deadline: float) -> bool:
    """Wait for the aim's instant and kill; False if it did not come."""
    span, background = spans.get(aim.phase, 0.0), aim.phase.in_background
    delay = aim.share * (max(span, NAP) + NAP * NAPS.get(aim.phase, 0))
    while all(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        if board.phase(aim.watched, background) == aim.phase and board.step(aim.watched, background) >= aim.step:
            time.sleep(delay)
            rare = aim.phase in (*ON_START, *ON_GROWTH, Phase.FINISH)  # then a little too late is better than never
            if rare or board.phase(aim.watched, background) == aim.phase:
                for victim in aim.victims:
                    os.kill(ranks[victim].pid, signal.SIGKILL)
                for victim in aim.victims:
                    ranks[victim].join()
                return True
            delay /= 2  # it was over sooner than usual: the next time
        time.sleep(POLL)
    return False


def _blow(board: Board, aim: Aim, seconds: float) -> Blow:
    """Read what the killed were doing: nothing has changed it since. A watched rank that was spared goes on."""
    background, step = aim.phase.in_background, board.step(aim.watched, aim.phase.in_background)
    if aim.watched in aim.victims:
        return Blow(board.text(aim.watched), board.phase(aim.watched, background) == aim.phase, step, seconds)
    return Blow(f"{aim.phase.text} ({board.text(aim.victims[0])})", True, step, seconds)


def _end(folder: Path, rank: int, killed: bool, code: int | None) -> End:
    path = folder / f"{rank}.json"
    if killed:
        return End("killed")
    return (
        End(**json.loads(path.read_text()))
        if path.exists()
        else End("failed", f"ended without a word, with code {code}")
    )


# ---- in a rank


def _rank(
    rank: int,
    port: int,
    folder: Path,
    config: RunConfig,
    board: Board,
    log: Path | None,
    aim: Aim | None,
    prepare: Prepare | None,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_PORT=str(port))
    board.enter(rank, Phase.JOIN, in_background=False)
    sys.stdout = sys.stderr = open(log or os.devnull, "a", buffering=1)  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    try:
        start_distributed(timedelta(seconds=GROUP_TIMEOUT))
        board.enter(rank, Phase.OUT, in_background=False)
        import megabus.train.loop as loop

        _tell_phases(_Reporter(board, rank, None if aim is None else aim.phase))
        if prepare is not None:
            prepare(rank, board)
        outcome = loop.train(config)
        stop_distributed(together=False)
        end = End("done", str(outcome.checkpoint))
    except UserError as error:
        end = End("UserError", str(error))
    except BaseException:
        end = End("failed", traceback.format_exc())
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # a test may have lowered it
    (folder / f"{rank}.json").write_text(json.dumps({"how": end.how, "text": end.text}))
    os._exit(end.how != "done")


class _Reporter:
    """Wraps functions so that they tell when this rank is in them, and dawdle where a short phase is aimed at."""

    def __init__(self, board: Board, rank: int, aimed: Phase | None) -> None:
        self.board, self.rank, self.aimed = board, rank, aimed

    @contextlib.contextmanager
    def during(self, phase: Phase | None) -> Iterator[None]:
        """None: the phase stays as it is."""
        background = threading.current_thread() is not threading.main_thread()
        before = self.board.phase(self.rank, background)
        now = before if phase is None else phase
        self.board.enter(self.rank, now, background)
        if now is self.aimed and now in ONLY_RANK_0:
            time.sleep(NAP)
        try:
            yield
        finally:
            self.board.enter(self.rank, before, background)

    def wrap(
        self,
        owner: Any,
        name: str,
        phase: Phase | None,
        first: Callable[..., object] | None = None,
        then: Callable[[Any], object] | None = None,
    ) -> None:
        """`first` hears the function's arguments before the phase begins, `then` its result after it has ended."""
        function = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if first is not None:
                first(*args)
            with self.during(phase):
                result = function(*args, **kwargs)
            if then is not None:
                then(result)
            return result

        setattr(owner, name, wrapped)


def _tell_phases(tell: _Reporter) -> None:
    import megabus.checkpoint.save as save
    import megabus.checkpoint.shards as shards
    import megabus.checkpoint.store as store
    import megabus.growth.transition as transition
    import megabus.train.loop as loop
    import megabus.train.run as run

    board, rank = tell.board, tell.rank

    def saves(_: object, snapshot: Any, __: object) -> None:
        board.tell_step(rank, snapshot.state.progress.step, in_background=True)

    tell.wrap(run, "start", Phase.START, then=lambda begun: board.tell_began(rank, begun.progress.step))
    tell.wrap(run, "restore", Phase.RESTORE)
    tell.wrap(loop, "train_step", Phase.STEP, lambda now: board.tell_step(rank, now.progress.step + 1))
    tell.wrap(loop, "validate", Phase.VALIDATE)
    # A growth passes through three phases: each lasts from one call's end to the next one's, not for a call.
    tell.wrap(loop, "grow", Phase.MOVE)
    tell.wrap(transition, "redistribute", Phase.MOVE, then=lambda _: board.enter(rank, Phase.BUILD, False))
    tell.wrap(loop, "grow_engine", Phase.MOVE, then=lambda _: board.enter(rank, Phase.GROWN, False))
    tell.wrap(loop, "save", Phase.SAVE)
    tell.wrap(loop, "finish", Phase.FINISH)
    tell.wrap(save.Saver, "_run", Phase.WRITE, saves)
    tell.wrap(shards, "write_shards", Phase.SHARDS)
    tell.wrap(save, "publish", Phase.PUBLISH)
    tell.wrap(store, "point_latest", Phase.LATEST)
    tell.wrap(save, "prune", Phase.PRUNE)
    # Two places to dawdle within these:
    tell.wrap(store, "settle", None)  # of the manifest, before the rename; of `latest`, before it moves
    tell.wrap(shutil, "rmtree", None)  # of an older checkpoint, after it lost its name
