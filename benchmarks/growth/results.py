"""Results of runs: a line of JSON each, appended when a run has ended and never changed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.growth.experiment import Job
from megabus.errors import UserError
from megabus.report.history import places, read_metrics


class Point(NamedTuple):
    """One validation: totals of the run up to there, and the loss in nats per token."""

    flops: float
    tokens: int
    hours: float
    loss: float


@dataclass(frozen=True)
class Result:
    """What a run did. loss: on the validation tokens at its end, infinity if it failed. growths: from the metrics."""

    experiment: str
    arm: str
    seed: int
    lr: float
    budget: float
    digest: str
    loss: float
    flops: float
    tokens: int
    steps: int
    hours: float
    n_params: int
    growths: list[dict[str, Any]]
    curve: list[Point]
    machine: str
    date: str
    failure: str = ""
    commit: str = ""  # of the code that ended the run
    data: str = ""  # the token files' fingerprint, where known: a digest has their names only


GROWTH_FACTS = ("step", "tokens", "flops", "reason", "old", "new", "loss_before", "loss_after", "stall_s")


def result_of(job: Job, run_dir: Path, machine: str, date: str) -> Result:
    """Read from a finished run's metrics."""
    rows = read_metrics(run_dir)
    hours = places(rows, "time")
    evals = [(row, at) for row, at in zip(rows, hours, strict=True) if row["event"] == "eval"]
    if not evals or evals[-1][0]["loss"] is None:  # an earlier loss is not what the run ended with
        return failed(job, "the last validation loss is not finite", machine, date)
    curve = [
        Point(row["flops"], row["tokens"], round(at, 6), row["loss"]) for row, at in evals if row["loss"] is not None
    ]
    growths = [{key: row[key] for key in GROWTH_FACTS} for row in rows if row["event"] == "growth"]
    sizes = growths[-1]["new"] if growths else rows[0]["sizes"]
    last = rows[-1]
    return Result(
        **_identity(job),
        loss=curve[-1].loss,
        flops=last["flops"],
        tokens=last["tokens"],
        steps=last["step"],
        hours=round(hours[-1], 6),
        n_params=sizes["n_params"],
        growths=growths,
        curve=curve,
        machine=machine,
        date=date,
    )


def failed(job: Job, why: str, machine: str, date: str) -> Result:
    """A run that ended with an error of its own making, such as a loss that is no number: it is not tried again."""
    nothing: dict[str, Any] = {"flops": 0.0, "tokens": 0, "steps": 0, "hours": 0.0, "n_params": 0}
    rest: dict[str, Any] = {"growths": [], "curve": [], "machine": machine, "date": date}
    return Result(**_identity(job), loss=math.inf, **nothing, **rest, failure=why)


def _identity(job: Job) -> dict[str, Any]:
    return {
        "experiment": job.experiment,
        "arm": job.arm,
        "seed": job.seed,
        "lr": job.lr,
        "budget": job.budget,
        "digest": job.digest,
        "data": job.data,
    }


def points_of_stages(run: Result) -> list[list[Point]]:
    """A run's validations by the stages that they were made in, the first of each at its beginning."""
    left, parts = list(run.curve), list[list[Point]]()
    for growth in run.growths:
        # A growth validates twice at its instant: the old size's last loss and the new one's first.
        n = next((i + 1 for i, point in enumerate(left) if point.flops >= growth["flops"]), len(left))
        parts.append(left[:n])
        left = left[n:]
    return [*parts, left]


class Results:
    """A file of results, by what was asked for. A line that was cut off by a kill is passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Result] = {}
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True) if path.exists() else [], 1):
            if line.endswith(b"\n"):
                try:
                    tree = json.loads(line)
                    tree["curve"] = [Point(*point) for point in tree["curve"]]
                    tree["loss"] = math.inf if tree["loss"] is None else tree["loss"]
                    result = Result(**tree)
                except (ValueError, TypeError, KeyError) as error:
                    problem = f"line {number} is no result ({type(error).__name__}: {error})"
                    raise UserError("results", path, problem, "remove the line") from error
                self._found[result.digest] = result

    def get(self, job: Job) -> Result | None:
        return self._found.get(job.digest)

    def check(self, job: Job) -> None:
        """Raises `UserError` where the run has been done on other token files than those at hand."""
        result = self.get(job)
        if result is not None and result.data and job.data and result.data != job.data:
            problem = f"holds {job.label} on other token files than those at hand"
            raise UserError("--results", self.path, problem, "name another file for these")

    def loss_of(self, job: Job) -> float | None:
        result = self.get(job)
        return None if result is None else result.loss

    def __iter__(self) -> Iterator[Result]:
        return iter(self._found.values())

    def add(self, result: Result) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        tree = asdict(result) | {"loss": result.loss if math.isfinite(result.loss) else None}
        with self.path.open("ab+") as file:
            file.truncate(self._whole())
            file.write(json.dumps(tree).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[result.digest] = result

    def _whole(self) -> int:
        """Bytes up to the end of the last line that was written to its end."""
        return self.path.read_bytes().rfind(b"\n") + 1
