"""Evaluations while training: further token files on the running engine, tasks on weights that are written aside."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from megabus.checkpoint.save import save_weights, writing_group
from megabus.config import RunConfig
from megabus.data.sources import bits_per_byte
from megabus.errors import UserError
from megabus.parallel.agree import rank_0_tells
from megabus.train.callbacks import Callback, Row
from megabus.train.task_runs import TaskRuns

if TYPE_CHECKING:
    from megabus.train.run import Run

PATIENCE = 5.0  # seconds between two looks, at the end of a run, whether it was asked not to wait


class Evaluations(Callback):
    """Of `eval.extra`. Training waits for the token files and for the writing of weights, not for tasks. Making it is
    collective."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.tasks = config.eval.extra, TaskRuns(config)
        self.group = writing_group() if self.config.tasks else None  # one for all snapshots
        self._measured = 0  # the last step that was one of `every`
        self._grown_from = 0  # length of the sequences that were measured before the growth that goes on

    def on_row(self, run: Run, row: Row) -> None:
        if row["event"] in ("start", "resume") and run.is_rank_0:
            self.tasks.restart(row["step"])
        super().on_row(run, row)

    def on_step(self, run: Run, row: Row) -> None:
        if self.config.every is not None and row["step"] % self.config.every == 0 and run.share < 1:
            self._measured = row["step"]
            self._measure(run, "step", run.stage.seq_len)

    def before_growth(self, run: Run) -> None:
        self._grown_from = run.stage.seq_len  # a phase's, perhaps
        if self._measured != run.progress.step:  # else the same weights, a moment ago
            self._measure(run, "before growth", self._grown_from)

    def on_growth(self, run: Run, row: Row) -> None:
        self._measure(run, "after growth", self._grown_from)

    def on_eval(self, run: Run, row: Row) -> None:
        if run.share >= 1:
            self._measure(run, "end", run.stage.seq_len)
        self._tell_ended(run, 0.0)

    def on_end(self, run: Run) -> None:
        """A run at its end waits for scores, until it is asked to stop. What waits then, the next start evaluates."""
        since = time.perf_counter()
        while run.share >= 1 and rank_0_tells(lambda: bool(self.tasks.waiting)):
            run.watchdog.heartbeat("the last evaluations")
            if self._tell_ended(run, PATIENCE, since):
                since = time.perf_counter()
            if run.requests.of_any(run.engine.device):
                break
        self.release()

    def release(self) -> None:
        """However the run ends: no evaluation outlives it, for the next start begins it anew. Of this rank alone."""
        self.tasks.end()

    def _measure(self, run: Run, when: str, seq_len: int) -> None:
        begun, losses, bits = time.perf_counter(), dict[str, float](), dict[str, float | None]()
        for name, source in run.corpora.sources.extra.items():
            run.watchdog.heartbeat(f"the evaluation of {name} after step {run.progress.step}")
            losses[name] = run.corpora.extra_loss(run.engine, name, seq_len)
            bits[name] = bits_per_byte(source, losses[name])
        if losses:
            seconds = time.perf_counter() - begun
            run.tell("evaluation", {"when": when, "loss": losses, "bits_per_byte": bits, "seconds": seconds})
        if self.config.tasks:
            self._write_aside(run, when)

    def _write_aside(self, run: Run, when: str) -> None:
        begun, step, config = time.perf_counter(), run.progress.step, run.config
        folder = self.tasks.root / f"step-{step:08d}-{when.replace(' ', '-')}"
        sections = {"train": config.train.model_dump(), "growth": {"stages": []}}
        run.watchdog.heartbeat(f"the writing of weights after step {step}")
        assert run.corpora.sources.tokenizer is not None
        try:
            save_weights(folder, run.engine, step, sections, run.corpora.sources.tokenizer.files, self.group)
        except UserError as error:  # of all ranks
            if run.is_rank_0:
                self.tasks.discard(folder)
            run.tell("tasks", {"when": when, "write_s": time.perf_counter() - begun, "error": str(error)})
            return
        run.watchdog.heartbeat()
        if run.is_rank_0:
            row = run.totals | {"when": when, "write_s": time.perf_counter() - begun}
            self.tasks.add(folder, row)
        self._tell_ended(run, 0.0)

    def _tell_ended(self, run: Run, patience: float, since: float | None = None) -> bool:
        """Whether any has. since: when the run, which has nothing else to do, began to wait for the first of them."""
        ended = rank_0_tells(lambda: self.tasks.ended(patience)) if self.config.tasks else []
        for row in ended:
            waited = {} if since is None else {"wait_s": time.perf_counter() - since}
            run.tell("tasks", row | waited)
            since = None
        return bool(ended)
