"""A look inside some steps: torch's profiler on every rank, and a snapshot of a GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.profiler import ProfilerActivity, profile

from megabus.config import RunConfig, Stage
from megabus.config.faults import ProfileConfig
from megabus.errors import UserError, warn
from megabus.model.cost import flops_per_token
from megabus.train.callbacks import Callback, Row

if TYPE_CHECKING:
    from megabus.train.run import Run

ROWS = 30  # of the table
TOLD = 5  # of them that the log and the metrics have
EVENTS = 100_000  # allocations that a snapshot of memory remembers


def folder_of_profile(run_dir: str | Path) -> Path:
    return Path(run_dir) / "profile"


def check_profile(config: RunConfig, stages: Sequence[Stage]) -> None:
    """Raise `UserError` where the run certainly ends before the first step to look at, and where there is no GPU whose
    memory could be looked at."""
    wanted, train = config.log.profile, config.train
    if wanted is None:
        return
    if wanted.memory and get_accelerator().device_name() != "cuda":
        problem = "is a snapshot of a GPU's memory, and this run has none"
        raise UserError("log.profile.memory", "true", problem, "leave it out")
    parts = [part for stage in stages for part in stage.parts]
    tokens = min(part.tokens_per_step for part in parts)
    flops = min(part.tokens_per_step * flops_per_token(part.model, part.seq_len) for part in parts)
    budgets = ((train.max_steps, 1), (train.max_tokens, tokens), (train.max_flops, flops))
    most = min(ceil(budget / step) if budget else inf for budget, step in budgets)
    if wanted.start > most:
        problem = f"comes after the end of the run, which has {most} steps at most"
        raise UserError("log.profile.start", wanted.start, problem, "lower it")


class Profile(Callback):
    """Looks at steps [start, start + steps) once, or at those until the run ends: a growth among them is in it too. A
    run that begins or goes on after the first of them looks at none.

    Files are RUN_DIR/profile/rank-N.json (a trace, for ui.perfetto.dev or chrome://tracing), rank-N.txt (the table) and
    rank-N.pickle (the snapshot). What cannot be written is told, and training goes on.
    """

    def __init__(self, config: ProfileConfig, run_dir: str | Path) -> None:
        self.config, self.folder = config, folder_of_profile(run_dir)
        self._looking: profile | None = None
        self._is_over = False

    def on_row(self, run: Run, row: Row) -> None:
        if row["event"] in ("start", "resume", "step", "skip"):
            self._at(run)
        none_yet = row["event"] == "resume" and self._looking is None and not self.folder.exists()
        if none_yet and row["step"] >= self.config.start and run.is_rank_0:
            problem = f"no step is looked at, as the run goes on from step {row['step']}"
            warn(str(UserError("log.profile.start", self.config.start, problem, "raise it")))

    def on_end(self, run: Run) -> None:
        if self._looking is not None:
            self._end(run)

    def release(self) -> None:
        """However the run ends: torch's profiler, of which a process has one, is free again. Of this rank alone."""
        looking, self._looking = self._looking, None
        if looking is not None:
            looking.stop()
            self._forget_memory()

    def _forget_memory(self) -> None:
        if self.config.memory:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _at(self, run: Run) -> None:
        """Between two steps."""
        step, first = run.progress.step, self.config.start
        if self._looking is not None and step >= first + self.config.steps - 1:
            self._end(run)
        elif self._looking is None and not self._is_over and step == first - 1:
            self._begin()

    def _begin(self) -> None:
        cuda = get_accelerator().device_name() == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        if self.config.memory:
            torch.cuda.memory._record_memory_history(max_entries=EVENTS)
        self._looking = profile(activities=activities, acc_events=True)
        self._looking.start()

    def _end(self, run: Run) -> None:
        looking, self._looking, self._is_over = self._looking, None, True
        assert looking is not None
        run.watchdog.heartbeat("writing a profile")
        looking.stop()
        averages = looking.key_averages()
        gpu = ProfilerActivity.CUDA in looking.activities
        own = "self_device_time_total" if gpu else "self_cpu_time_total"
        name = self.folder / f"rank-{dist.get_rank():05d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            name.with_suffix(".txt").write_text(averages.table(sort_by=own, row_limit=ROWS), encoding="utf-8")
            looking.export_chrome_trace(str(name.with_suffix(".json")))
            if self.config.memory:
                torch.cuda.memory._dump_snapshot(str(name.with_suffix(".pickle")))
        except OSError as error:
            warn(f"log.profile: {name}.* cannot be written on rank {dist.get_rank()} ({error}): training goes on")
        finally:
            self._forget_memory()
        first = self.config.start
        run.tell(
            "profile", {"first": first, "last": run.progress.step, "folder": str(self.folder)} | _top(averages, own)
        )


def _top(averages: Any, own: str) -> dict[str, Any]:
    """Of this rank, the operations with most time of their own: name -> its share of all."""
    times = {each.key: getattr(each, own) for each in averages}
    total = sum(times.values()) or 1.0
    first = sorted(times, key=lambda key: -times[key])[:TOLD]
    return {"shares": {key: times[key] / total for key in first}}
