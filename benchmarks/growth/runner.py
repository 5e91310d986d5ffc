"""Runs jobs side by side, each with the launcher that a user starts; stops in time, and goes on where it stopped."""

from __future__ import annotations

import datetime
import fcntl
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import Popen, TimeoutExpired

import yaml

from benchmarks.checkout import commit
from benchmarks.growth.experiment import Experiment, Job, jobs
from benchmarks.growth.prefix import common, go_on_from_others, keep_what_others_may_need
from benchmarks.growth.protocol import check_text
from benchmarks.growth.results import Results, failed, result_of
from megabus.checkpoint.store import checkpoints_of, complete
from megabus.config import RunConfig
from megabus.errors import UserError, say, warn

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.5  # seconds
STOPPED = 75  # the exit code of a run that saved because it was asked to stop
BAD_INPUT = 2
TIDY = 60.0  # seconds
LONGEST_STOP = 300.0  # seconds that runs get to save in
TRIES = 2  # of a run that ended with an error which is not of its own making


@dataclass
class Going:
    """A run that is going on."""

    job: Job
    slot: int
    process: Popen[bytes]
    said: int  # bytes of its log that are of earlier starts
    commit: str
    stopping: bool = False


class Runner:
    """`machine`: named in results. `work`: the directory of runs, a name an experiment."""

    def __init__(self, experiment: Experiment, results: Results, work: Path, machine: str) -> None:
        self.experiment, self.results, self.machine = experiment, results, machine
        self.work = (work / experiment.name).resolve()  # runs have another working directory
        self.going: list[Going] = []
        self.tries: dict[str, int] = {}
        self.tidied = time.monotonic()

    def run(self, side_by_side: int, only: Sequence[str] = (), hours: float | None = None) -> bool:
        """Run what is not done, at most so many at a time, for at most so long; whether all is done."""
        check_text(self.experiment, only)
        deadline = None if hours is None else time.monotonic() + hours * 3600
        with self._alone():
            try:
                changed = True  # else there is nothing new to start: asking costs a quarter of a core
                while deadline is None or time.monotonic() < deadline:
                    while changed and len(self.going) < side_by_side and (job := next(self._open(only), None)):
                        self._start(job)
                    if not self.going:
                        return True
                    time.sleep(POLL)
                    changed = self._collect()
                    self._tidy()
                say(f"{hours:g} hour(s) are over: {len(self.going)} run(s) stop, and go on with the same command")
            finally:
                self._stop()
        return False

    def folder(self, job: Job) -> Path:
        """Of what was asked for and of the token files: what is found there goes on."""
        return self.work / "-".join(filter(None, (job.label, job.digest[:8], job.data[:6])))

    def _open(self, only: Sequence[str]) -> Iterator[Job]:
        """What is neither done nor going on. Those that could share more with a run that is going on than with any that
        is done come last."""
        at_work = [going.job for going in self.going]
        waiting: list[Job] = []
        for job in jobs(self.experiment, self.results.loss_of, only):
            self.results.check(job)
            if self.results.get(job) or any(job.digest == other.digest for other in at_work):
                continue
            if any(common(self._config(other), self._config(job)).growths >= 0 for other in at_work):
                waiting.append(job)
            else:
                yield job
        yield from waiting

    def _config(self, job: Job) -> RunConfig:
        return job.config(self.folder(job))

    def _others(self, job: Job) -> Iterator[tuple[Path, RunConfig]]:
        for other in jobs(self.experiment, self.results.loss_of):
            if other.digest != job.digest and self.folder(other).is_dir():
                yield self.folder(other), self._config(other)

    def _start(self, job: Job) -> None:
        run_dir, config = self.folder(job), self._config(job)
        if not complete(checkpoints_of(run_dir)):
            origin = go_on_from_others(run_dir, config, self._others(job))
            if origin is not None:
                say(f"{job.label}: the same as {origin.parents[1].name} up to {origin.name}")
        run_dir.mkdir(parents=True, exist_ok=True)
        tree = config.model_dump(mode="json", exclude_unset=True)
        tree["faults"] = tree.get("faults", {}) | {"stop_exit_code": STOPPED}
        tree["preflight"] = {"enabled": False}  # the runner keeps all checkpoints for a while, and thins them itself
        tree["checkpoint"] = tree.get("checkpoint", {}) | {"keep_last": 1_000_000}
        path = run_dir / "job.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        slot = next(n for n in range(len(self.going) + 1) if all(going.slot != n for going in self.going))
        command = [sys.executable, "launcher/train.py", "--config", str(path)]
        with (run_dir / "log").open("ab") as log:
            said = log.tell()
            process = Popen(command, cwd=ROOT, env=environment(slot), stdout=log, stderr=log, start_new_session=True)
        self.going.append(Going(job, slot, process, said, commit()))
        say(f"{clock()} {job.label}: started")

    def _collect(self) -> bool:
        """Whether any run has ended."""
        ended = [going for going in self.going if going.process.poll() is not None]
        errors: list[UserError] = []
        for going in ended:  # all of them, before any error is told
            self.going.remove(going)
            try:
                self._ended(going, going.process.returncode)
            except UserError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return bool(ended)

    def _tidy(self) -> None:
        """Now and then delete checkpoints of runs that go on: kept all, a large model's would fill the disk."""
        if time.monotonic() - self.tidied > TIDY:
            self.tidied = time.monotonic()
            for going in self.going:
                keep_what_others_may_need(self.folder(going.job), self._config(going.job), newest=2)

    def _ended(self, going: Going, code: int) -> None:
        job = going.job
        run_dir, date = self.folder(job), f"{datetime.date.today()}"
        if code == 0:
            result = replace(result_of(job, run_dir, self.machine, date), commit=going.commit)
            self.results.add(result)
            keep_what_others_may_need(run_dir, self._config(job))
            done = sum(1 for other in jobs(self.experiment, self.results.loss_of) if self.results.get(other))
            say(f"{clock()} {job.label}: loss {result.loss:.4f}, {result.hours * 60:.1f} min ({done} runs done)")
        elif code in (-signal.SIGTERM, -signal.SIGKILL) and going.stopping:
            say(f"{clock()} {job.label}: stopped before it could hear of it, and begins where it began")
        elif code == STOPPED:
            say(f"{clock()} {job.label}: stopped and saved")
        else:
            lines = (run_dir / "log").read_bytes()[going.said :].decode(errors="replace").strip().splitlines()
            why = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
            if code == BAD_INPUT and why.startswith("error: train.loss = "):
                self.results.add(replace(failed(job, why, self.machine, date), commit=going.commit))
                keep_what_others_may_need(run_dir, self._config(job))
                warn(f"{job.label} failed: {why}")
                return
            self.tries[job.digest] = self.tries.get(job.digest, 0) + 1
            if code == BAD_INPUT or self.tries[job.digest] >= TRIES:
                raise UserError("run", run_dir, f"ended with code {code}: {why}", f"read {run_dir / 'log'}")
            warn(f"{job.label} ended with code {code} and is started again: {why}")

    def _stop(self) -> None:
        """Let every run save and end."""
        for going in self.going:
            going.stopping = True
            going.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + LONGEST_STOP
        for going in self.going:
            try:
                going.process.wait(max(0.1, deadline - time.monotonic()))
            except TimeoutExpired:
                warn(f"{going.job.label} does not stop: killed; it goes on from its last checkpoint")
                going.process.kill()
                going.process.wait()
        self._collect()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One runner at a time for a file of results, and for a directory of runs."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.results.path.parent.mkdir(parents=True, exist_ok=True)
        with (self.work / ".lock").open("a") as lock, self.results.path.open("a") as written:
            for file in (lock, written):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    problem = "is being used by another runner"
                    raise UserError("experiment", file.name, problem, "wait for it") from error
            yield


def environment(slot: int) -> dict[str, str]:
    """Of a run of one process: one thread, and one of the GPUs if there are any."""
    import torch

    from megabus.testing.ranks import free_port

    gpus = torch.cuda.device_count()
    place = {"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus else {"DS_ACCELERATOR": "cpu"}
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return {**os.environ, **rank, "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **place}


def clock() -> str:
    return f"{datetime.datetime.now():%H:%M:%S}"
