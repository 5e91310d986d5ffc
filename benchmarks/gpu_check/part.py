"""A part of the check: a process of its own with a time limit, whose findings are on the disk as soon as made."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megabus.engine.startup import on_gpu, prepare_environment
from megabus.testing.ranks import free_port

DONE, LATE, LEFT_OUT = "done", "out of time", "left out"  # how states begin


@dataclass
class PartResult:
    """What a part has found, in `file`. rows: (what, what was found, whether that is right or None where it is no
    question of right and wrong). facts: what other parts need."""

    file: Path
    state: str = "begun"
    rows: list[tuple[str, str, bool | None]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def __call__(self, what: str, found: object, ok: bool | None = None) -> None:
        self.rows.append((what, str(found), ok))
        self.write()

    def write(self) -> None:
        """In one piece: the process may be ended at any time."""
        beside = self.file.with_suffix(".new")
        beside.write_text(json.dumps({"state": self.state, "rows": self.rows, "facts": self.facts}, indent=1) + "\n")
        beside.replace(self.file)

    @classmethod
    def read(cls, file: Path) -> PartResult:
        found = json.loads(file.read_text())
        return cls(file, found["state"], [(what, text, ok) for what, text, ok in found["rows"]], found["facts"])


@dataclass
class Check:
    """What a part gets. small: tiny sizes, to see that it runs. folder: its own, for files."""

    small: bool
    folder: Path
    tell: PartResult

    @property
    def on_gpu(self) -> bool:
        return on_gpu()


Job = Callable[[Check], None]


@dataclass(frozen=True)
class Part:
    """seconds: at most. decides: whether Triton's kernels are recorded as right only if this part is."""

    name: str
    job: Job
    seconds: float
    decides: bool

    def passed(self, result: PartResult) -> bool:
        return result.state == DONE and _none_is_wrong(result)

    def is_only_late(self, result: PartResult) -> bool:
        """A measurement that there was no time for: nothing is wrong for that."""
        return not self.decides and result.state.startswith((LATE, LEFT_OUT)) and _none_is_wrong(result)


def _none_is_wrong(result: PartResult) -> bool:
    return all(ok is not False for _, _, ok in result.rows)


def run_part(part: Part, out: Path, small: bool, seconds: float) -> PartResult:
    """In a process of its own, which is ended after so many seconds with all that it has started. The rows that it has
    told by then count; what it prints goes to a .log beside them."""
    result = PartResult(out / f"{part.name}.json")
    result.write()
    if seconds <= 0:
        result.state = f"{LEFT_OUT}: the time of all parts is spent"
        result.write()
        return result
    context: Any = get_context("spawn" if on_gpu() else "fork")
    process = context.Process(target=_run, args=(part, out, small))
    begun = time.monotonic()
    process.start()
    try:
        process.join(seconds)
    finally:
        with suppress(ProcessLookupError):  # its group: what it has started goes too
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    found = PartResult.read(result.file)
    if found.state == result.state:
        late = time.monotonic() - begun >= seconds
        found.state = f"{LATE} after {seconds:.0f} s" if late else f"ended with exit code {process.exitcode}"
        found.write()
    return found


def _run(part: Part, out: Path, small: bool) -> None:
    os.setsid()
    log = (out / f"{part.name}.log").open("w", buffering=1)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = log
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_PORT=str(free_port()))
    folder = out / part.name
    folder.mkdir(exist_ok=True)
    result = PartResult(out / f"{part.name}.json")
    try:
        prepare_environment()
        part.job(Check(small, folder, result))
        result.state = DONE
    except BaseException as error:
        traceback.print_exc()
        result.state = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    result.write()
    os._exit(0)
