"""Nothing is lost: a small growing run is killed at chosen instants, goes on, and ends as if it never had been.

What is compared are bits: all tensors of the last checkpoint, and every number of `metrics.jsonl` that is no time.
What a run must go on from is found on the disk before it starts, by code that shares none with the trainer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from safetensors.numpy import load_file

from megabus.config import RunConfig
from megabus.errors import UserError
from megabus.report.history import read_metrics
from megabus.testing.chaos_ranks import (
    LIMIT,
    ON_GROWTH,
    ON_START,
    ONLY_RANK_0,
    WORLD,
    Aim,
    Attempt,
    Phase,
    Spans,
    attempt,
)
from megabus.testing.chaos_runs import EVAL_EVERY, SAVE_EVERY, run_config, undisturbed_dir

KILLS_A_RUN = 4
# of rows: no two runs agree in them
TIMES = ("tokens_per_s", "tokens_per_s_per_gpu", "mfu", "seconds", "stall_s", "environment")
AIMS = (
    Phase.STEP,
    Phase.SHARDS,
    Phase.BUILD,
    Phase.LATEST,
    Phase.RESTORE,
    Phase.VALIDATE,
    Phase.GROWN,
    Phase.PUBLISH,
    Phase.START,
    Phase.MOVE,
    Phase.PRUNE,
    Phase.FINISH,
    Phase.SAVE,
    Phase.JOIN,
)


# ---- what is on the disk


@dataclass(frozen=True)
class Remains:
    """What a finished run has left: the newest checkpoint's tensors by `file/tensor` and its state, the rows of
    `metrics.jsonl` without times, and what lies in `checkpoints`."""

    tensors: dict[str, np.ndarray]
    state: dict[str, Any]
    rows: list[dict[str, Any]]
    names: list[str]


def remains(run_dir: str | Path) -> Remains:
    root = Path(run_dir) / "checkpoints"
    step, _ = newest_whole(root)
    folder = root / f"step-{step or 0:08d}"
    tensors = {f"{p.name}/{k}": v for p in sorted(folder.glob("*.safetensors")) for k, v in load_file(p).items()}
    state = json.loads((folder / "state.json").read_text())
    del state["config"]  # the run's directory and the like
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in read_metrics(run_dir)]
    return Remains(tensors, state, rows, sorted(path.name for path in root.iterdir()))


def differences(reference: Remains, other: Remains) -> list[str]:
    """Where two runs do not agree to the bit, a line each; none if nothing was lost."""
    found = []
    if reference.tensors.keys() != other.tensors.keys():
        found.append(f"other tensors: {sorted(reference.tensors.keys() ^ other.tensors.keys())[:3]}")
    both = sorted(reference.tensors.keys() & other.tensors.keys())
    unequal = [name for name in both if not _same_bits(reference.tensors[name], other.tensors[name])]
    if unequal:
        found.append(f"{len(unequal)} of {len(both)} tensors differ: {unequal[0]}")
    keys = sorted(reference.state.keys() | other.state.keys())
    found += [f"state.{key} differs" for key in keys if reference.state.get(key) != other.state.get(key)]
    places = [[f"{row['event']} {row['step']}" for row in run.rows] for run in (reference, other)]
    if places[0] != places[1]:
        odd = next((pair for pair in zip(*places, strict=False) if pair[0] != pair[1]), ("the end", "another"))
        found.append(f"logged rows are others: {odd[1]} where {odd[0]} should be")
    else:
        pairs = zip(places[0], reference.rows, other.rows, strict=True)
        values = [f"{k} of {at}" for at, a, b in pairs for k in a | b if a.get(k) != b.get(k)]
        found += [f"{len(values)} logged values differ: {values[0]}"] if values else []
    if reference.names != other.names:
        found.append(f"checkpoints holds {other.names}, not {reference.names}")
    return found


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def losses(reference: Remains, run_dir: str | Path) -> list[str]:
    """The differences of a finished run, or why it cannot be compared."""
    try:
        return differences(reference, remains(run_dir))
    except (OSError, ValueError, UserError) as error:
        return [f"cannot be compared: {error}"]


def newest_whole(root: Path) -> tuple[int | None, list[str]]:
    """The step of the newest checkpoint whose files are all what its manifest says, and the names of those that have
    a whole one's name and are none."""
    whole, torn = list[str](), list[str]()
    for folder in sorted(root.glob("step-*[0-9]")):
        try:
            files = json.loads((folder / "manifest.json").read_text())["files"]
            sums = {entry["name"]: entry["digest"] for entry in files}
            found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"}
            good = sums == {name: f"blake3:{blake3(data).hexdigest()}" for name, data in found.items()}
        except (OSError, ValueError, KeyError):
            good = False
        (whole if good else torn).append(folder.name)
    return (int(whole[-1].partition("-")[2]) if whole else None), torn


# ---- the undisturbed run


@dataclass(frozen=True)
class Workload:
    """A schedule's run as it is when nobody disturbs it, and how long its phases take."""

    schedule: str
    folder: Path
    run_dir: Path
    remains: Remains
    spans: Spans

    def config(self, run_dir: Path, **checkpoint: Any) -> RunConfig:
        return run_config(self.folder, run_dir, self.schedule, **checkpoint)

    def steps_of(self, event: str) -> list[int]:
        return [row["step"] for row in self.remains.rows if row["event"] == event]

    @property
    def last_step(self) -> int:
        return self.steps_of("step")[-1]


def undisturbed(folder: Path, schedule: str) -> Workload:
    """Run a schedule to its end; `folder` holds the corpora. Raises RuntimeError if it does not get there."""
    run_dir = undisturbed_dir(folder, schedule)
    run = attempt(run_config(folder, run_dir, schedule), folder / f"undisturbed-{schedule}.log")
    if not run.done:
        raise RuntimeError(f"the undisturbed run {schedule} fails: {run.ending()}")
    spans = {phase: run.board.span(phase) for phase in Phase}
    return Workload(schedule, folder, run_dir, remains(run_dir), spans)


# ---- kills


@dataclass
class Kill:
    """One kill and what became of the run: a row of the table. `newest`: the checkpoint on the disk after it."""

    schedule: str
    run: int
    aim: Aim
    real: str
    hit: bool
    step: int
    seconds: float
    newest: int | None
    resumed: int | None = None  # None: killed again before it had
    problems: list[str] = field(default_factory=list)


def trial(workload: Workload, number: int, folder: Path, aims: Sequence[Aim]) -> tuple[list[Kill], list[Aim]]:
    """Start a run, kill it at each aim in turn, let it finish, and judge; the kills, and the aims that never came."""
    config = workload.config(folder / f"run-{number}")
    root, log = Path(config.run_dir) / "checkpoints", folder / f"run-{number}.log"
    kills: list[Kill] = []
    newest: int | None = None
    while True:
        aim = aims[len(kills)] if len(kills) < len(aims) else None
        run = attempt(config, log, aim, workload.spans, LIMIT)
        if kills:
            judge_resume(kills[-1], run)
        if run.board.span(Phase.RESTORE):
            workload.spans[Phase.RESTORE] = run.board.span(Phase.RESTORE)  # an undisturbed run has none
        if run.blow is None or aim is None:
            break
        blow, before = run.blow, newest
        newest, torn = newest_whole(root)
        kill = Kill(workload.schedule, number, aim, blow.real, blow.hit, blow.step, blow.seconds, newest)
        kill.problems += [f"{name} is not whole" for name in torn]
        if (newest or 0) < (before or 0):
            kill.problems.append(f"the checkpoint of step {before} is gone")
        hung = [rank for rank, end in enumerate(run.ends) if end.how == "hung"]
        if hung:
            kill.problems.append(f"rank(s) {hung} did not end within {LIMIT:g} s")
        if newest != workload.last_step and any(end.how == "done" for end in run.ends):
            kill.problems.append("a rank ended well without the last checkpoint")
        kills.append(kill)
    problems = losses(workload.remains, config.run_dir) if run.done else [f"did not finish: {run.ending()}"]
    if problems and not kills:
        raise RuntimeError(f"run {number} of schedule {workload.schedule}, which was not killed: {problems[0]}")
    for kill in kills:
        kill.problems += problems
    return kills, list(aims[len(kills) :])


def judge_resume(kill: Kill, run: Attempt) -> None:
    """The start after a kill went on from what the kill has left, if it got that far."""
    if None in run.began:
        return
    steps = sorted(step for step in run.began if step is not None)
    kill.resumed = steps[0]
    if steps != [kill.newest or 0]:
        kill.problems.append(f"went on from {steps}, the checkpoint of step {kill.newest or 0} was there")


def plan(rng: random.Random, phases: Sequence[Phase], workload: Workload) -> list[Aim]:
    """An aim for each phase, in the order in which a run can be killed at them one after another."""
    growths, last = workload.steps_of("growth"), workload.last_step
    timed = []
    for number, phase in enumerate(phases):
        if phase in ON_GROWTH:
            step = rng.choice(growths)
        elif phase is Phase.FINISH:
            step = last
        elif phase is Phase.VALIDATE:
            step = rng.randrange(EVAL_EVERY, last + 1, EVAL_EVERY)
        else:
            step = rng.randint(SAVE_EVERY + 1, last)
        many = [1, rng.randint(2, WORLD - 1), WORLD][number % 3] if phase is not Phase.JOIN else 1
        victims = tuple(rng.sample(range(WORLD), many))
        if phase in ONLY_RANK_0 and rng.random() < 0.5:  # the last save is one that no later save tidies up after
            step, victims = last, (0,)
        # A run is killed while it starts at any time of its life, and at the first of such instants.
        timed.append((step, Aim(phase, 0 if phase in ON_START else step, rng.random(), victims)))
    timed.sort(key=lambda pair: (pair[0], pair[1].phase))
    aims = [aim for _, aim in timed]
    for aim in [aim for aim in aims if aim.phase is Phase.RESTORE]:  # which needs something to restore
        trained = next((other for other in aims if other.phase not in ON_START), aim)
        if aims.index(trained) > aims.index(aim):
            aims.remove(aim)
            aims.insert(aims.index(trained) + 1, aim)
    return aims


def kill_runs(
    workloads: Sequence[Workload], folder: Path, wanted: int, seed: int, tell: Callable[[list[Kill]], object]
) -> list[Kill]:
    """At least `wanted` kills over all phases of the schedules in turn, run after run; `tell` hears of each run's."""
    rng, kills = random.Random(seed), list[Kill]()
    waiting: list[list[Phase]] = [[] for _ in workloads]
    number = 0
    while len(kills) < wanted and number < 2 * wanted:
        queue, workload = waiting[number % len(workloads)], workloads[number % len(workloads)]
        if len(queue) < KILLS_A_RUN:
            queue.extend(rng.sample(AIMS, len(AIMS)))
        phases = [queue.pop(0) for _ in range(KILLS_A_RUN)]
        done, missed = trial(workload, number, folder, plan(rng, phases, workload))
        queue[:0] = [aim.phase for aim in missed]
        tell(done)
        kills += done
        number += 1
    return kills
