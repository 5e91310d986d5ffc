"""Tasks of lm-evaluation-harness on weights that were written aside, by one process at a time beside the training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megabus
from megabus.command import OUTCOME
from megabus.config import RunConfig
from megabus.durable import partial_name
from megabus.errors import warn
from megabus.train.callbacks import Row

ABOUT, LOG, SCORES = "about.json", "log.txt", "scores.json"  # in a snapshot's folder
NICE = 10  # of the process: what it takes of the processors is what the ranks leave
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", OUTCOME)


def without_launcher() -> dict[str, str]:
    """This process's environment for another that is no rank, though this one may be."""
    return {key: value for key, value in os.environ.items() if key not in OF_LAUNCHERS}


class TaskRuns:
    """Rank 0's. Snapshots wait in folders of `root`, each with the row that its scores will go into, so that those
    which a stopped run has left are evaluated by the next start. Whatever becomes of these files, a snapshot without
    scores is told, and is no reason to end a run."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.root = config.eval.extra, Path(config.run_dir) / "evaluations"
        self.waiting: dict[Path, Row] = {}  # folder -> its row, in the order of evaluation
        self._failed: list[Row] = []  # before their evaluation could begin
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = 0.0

    def restart(self, step: int) -> None:
        """A start, or a return to a checkpoint: what was written after `step` will be written again."""
        self.end()
        for folder in sorted(self.root.glob("*")):
            row = _about(folder)
            if row is not None and row["step"] <= step:
                self.waiting[folder] = row
            else:
                self.discard(folder)

    def add(self, folder: Path, row: Row) -> None:
        partial = partial_name(folder / ABOUT)
        try:
            partial.write_text(json.dumps(row))
            partial.replace(folder / ABOUT)
        except OSError as error:
            self._failed.append(row | {"seconds": 0.0, "error": f"{folder} cannot be written ({error})"})
            self.discard(folder)
            return
        self.waiting[folder] = row

    def discard(self, folder: Path) -> None:
        """Of a snapshot that comes to nothing, the weights too: they would stay on a disk that may be full."""
        shutil.rmtree(folder, ignore_errors=True)

    def ended(self, patience: float = 0.0) -> list[Row]:
        """Rows of the evaluations that have ended; one goes on at a time. patience: seconds to wait for that one."""
        rows, self._failed = self._failed, []
        if self._process is not None:
            try:
                self._process.wait(patience)
            except subprocess.TimeoutExpired:
                return rows
            process, self._process = self._process, None
            rows.append(self._done(self._outcome(next(iter(self.waiting)), process.returncode)))
        while self.waiting and self._process is None:
            try:
                self._start(next(iter(self.waiting)))
            except OSError as error:
                rows.append(self._done({"seconds": 0.0, "error": str(error)}))
        return rows

    def _done(self, outcome: dict[str, Any]) -> Row:
        folder = next(iter(self.waiting))
        row = self.waiting.pop(folder) | outcome
        self.discard(folder)
        return row

    def end(self) -> None:
        """What goes on is not finished: its snapshot stays. May be called more than once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process, self.waiting = None, {}

    def _start(self, folder: Path) -> None:
        kept = without_launcher() | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # GPUs are the ranks'
        kept["TMPDIR"] = str(folder.resolve())  # so that what it makes goes with the snapshot
        home = str(Path(megabus.__file__).parents[1])
        kept["PYTHONPATH"] = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        with (folder / LOG).open("wb") as log:
            self._process = subprocess.Popen(
                self.command(folder), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=kept, start_new_session=True
            )
        os.setpriority(os.PRIO_PROCESS, self._process.pid, NICE)
        self._begun = time.monotonic()

    def command(self, folder: Path) -> list[str]:
        """What evaluates a snapshot, and leaves `SCORES`."""
        words = [sys.executable, "-m", "megabus", "evaluate", str(folder), "--tasks", *self.config.tasks]
        if self.config.task_path is not None:
            words += ["--task-path", self.config.task_path]
        if self.config.metadata:
            words += ["--metadata", json.dumps(self.config.metadata)]
        if self.config.limit is not None:
            words += ["--limit", str(self.config.limit)]
        return [*words, "--json", str(folder / SCORES), "--end-with", str(os.getpid())]

    def _outcome(self, folder: Path, code: int) -> dict[str, Any]:
        row = {"seconds": time.monotonic() - self._begun}
        try:
            if code == 0:
                scores: Mapping[str, float] = json.loads((folder / SCORES).read_text())["tasks"]
                return row | {"scores": scores}
            lines = (folder / LOG).read_text(errors="replace").split("\n")
        except (OSError, ValueError) as error:
            return row | {"error": f"exit code {code}, and what it has left cannot be read ({error})"}
        said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
        return row | {"error": f"exit code {code}: {said[-300:]}"}


def _about(folder: Path) -> Row | None:
    """The row of a snapshot that an earlier start has left; None of one that was not finished, or is damaged."""
    try:
        row = json.loads((folder / ABOUT).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        warn(f"no tasks of {folder}: {ABOUT} cannot be read ({error})")
        return None
    if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("when"), str):
        return row
    warn(f"no tasks of {folder}: {ABOUT} does not say what they are of")
    return None
