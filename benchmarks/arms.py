"""Arms of a comparison: ranks that stay alive, and work only when they are told to. On CPUs the arms take turns; on
GPUs each has the memory to itself, and comes after the one before it has ended."""

from __future__ import annotations

import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megabus.engine.startup import on_gpu, prepare_environment, start_distributed
from megabus.testing.ranks import free_port, preload

Step = Callable[[], object]


@dataclass(frozen=True)
class Arm:
    """`world` ranks, on each of which `make(*args)` prepares and returns what it then does again and again.

    apart: as many worlds of one rank each, that work at the same time and know nothing of each other.
    """

    label: str
    world: int
    make: Callable[..., Step]
    args: tuple[Any, ...] = ()
    apart: bool = False


@dataclass(frozen=True)
class Timing:
    """Seconds a step in each round, of the slowest rank, and the bytes that the rank which needs most allocated at its
    peak (CUDA memory on a GPU; else memory that is resident, above what the process had before `make`)."""

    seconds: list[float]
    memory: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Ranks:
    """An arm's processes."""

    def __init__(self, arm: Arm) -> None:
        self.arm = arm
        context: Any = get_context("spawn" if on_gpu() else "fork")
        port, self.pipes, self.processes = free_port(), [], []
        for rank in range(arm.world):
            here, there = context.Pipe()
            process = context.Process(target=_rank, args=(rank, arm, port, there), daemon=True)
            process.start()
            there.close()  # or its end would go unnoticed
            self.pipes.append(here)
            self.processes.append(process)
        try:
            self._answers()
        except RuntimeError:
            self.kill()
            raise

    def __call__(self, steps: int) -> float:
        """Seconds a step."""
        for pipe in self.pipes:
            pipe.send(steps)
        return max(self._answers()) / steps

    def close(self) -> int:
        for pipe in self.pipes:
            pipe.send(0)
        return max(self._answers())

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _answers(self) -> list[Any]:
        answers = []
        for rank, pipe in enumerate(self.pipes):
            try:
                answer = pipe.recv()
            except EOFError:
                answer = "it was killed"
            if isinstance(answer, str):
                raise RuntimeError(f"rank {rank} of the arm {self.arm.label!r} failed: {answer}")
            answers.append(answer)
        return answers


def in_turn(arms: Sequence[Arm], rounds: int, steps: int) -> dict[str, Timing]:
    """Each arm's timing. In every round each arm makes `steps` steps while the others that are alive wait; one round
    warms up."""
    prepare_environment()
    if not on_gpu():
        preload()
    timings: dict[str, Timing] = {}
    for group in at_a_time(arms):
        timings |= _take_turns(group, rounds, steps)
    return timings


def at_a_time(arms: Sequence[Arm]) -> list[Sequence[Arm]]:
    """Which arms are alive together: on GPUs each alone, for two may not fit, and clocks there are steady enough."""
    return [[arm] for arm in arms] if on_gpu() else [arms]


def _take_turns(arms: Sequence[Arm], rounds: int, steps: int) -> dict[str, Timing]:
    with ExitStack() as stack:
        alive = {arm.label: stack.enter_context(_alive(arm)) for arm in arms}
        seconds: dict[str, list[float]] = {label: [] for label in alive}
        for turn in range(rounds + 1):
            for label, ranks in alive.items():
                took = ranks(steps)
                if turn:
                    seconds[label].append(took)
        return {label: Timing(seconds[label], ranks.close()) for label, ranks in alive.items()}


@contextmanager
def _alive(arm: Arm) -> Iterator[Ranks]:
    ranks = Ranks(arm)
    try:
        yield ranks
    finally:
        ranks.kill()


def _rank(rank: int, arm: Arm, port: int, pipe: Connection) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": arm.world, "MASTER_PORT": port}
    if arm.apart:
        place |= {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 0}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        prepare_environment()
        start_distributed()
        peak = PeakMemory()
        step = arm.make(*arm.args)
        step()
        pipe.send(0.0)
        while steps := pipe.recv():
            begun = _together()
            for _ in range(steps):
                step()
            pipe.send(_together() - begun)
        pipe.send(peak.bytes())
    except BaseException:
        pipe.send(traceback.format_exc())
    os._exit(0)


def _together() -> float:
    """The time at which all ranks of the arm, and their GPUs, have come this far."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


class PeakMemory:
    """This process's largest memory since this was made, above what it had then; see `Timing`."""

    def __init__(self) -> None:
        if on_gpu():
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        self.before = _status("VmRSS")

    def bytes(self) -> int:
        if on_gpu():
            import torch

            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") - self.before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
