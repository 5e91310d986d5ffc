"""Fork ranks from a process that has imported torch and DeepSpeed already: 0.2 s a job instead of 10 s.

Ranks on GPUs are started anew instead: CUDA does not survive a fork."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import io
import itertools
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megabus.engine.startup import import_deepspeed, prepare_environment, start_distributed, stop_distributed

PORTS = range(20_000, 32_768)  # Linux gives out those from 32768 on by itself, for any connection
WORKERS = 32  # of pytest, with a range each; the first range is for all that is none
IN_EVERY_RANK = (  # else imported by each of them, once its engine is made or has taken a step
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.utils.pin_memory",
    "encodings.idna",
    "megabus.engine.hardware",
    "numpy.ctypeslib",
    "numpy.ma",
    "torch.profiler._cupti_monitor",
)
_ports = itertools.count(os.getpid())  # several programs of one range begin at different places
_taken: deque[socket.socket] = deque(maxlen=64)  # holds the names of the last ports, see `free_port`


def preload() -> None:
    """Import what every rank needs, once. No thread may be started here: ranks are forked."""
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # ranks of a test share no GPU, and are forked
    prepare_environment()
    import_deepspeed()
    import torch
    import torch._dynamo

    import megabus.checkpoint.shards
    import megabus.engine.engine  # noqa: F401

    for name in IN_EVERY_RANK:
        importlib.import_module(name)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is imported lives for ever: the ranks' collections, of which there are many, pass it over


def run_ranks(world: int, job: Callable[..., Any], *args: Any, timeout: float = 120.0, gpu: bool = False) -> list[Any]:
    """Call `job(*args)` on `world` ranks joined by gloo, or one a GPU by NCCL; returns the results in rank order. On
    GPUs the job is a function of a module.

    Raises RuntimeError with the traceback of every rank that failed, or after `timeout` seconds with every rank's
    stack.
    """
    if not gpu:
        preload()
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    port = free_port()
    context: Any = get_context("spawn" if gpu else "fork")
    ranks = [context.Process(target=_rank, args=(r, world, port, folder, job, args), daemon=True) for r in range(world)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # what a fork inherits unflushed would print again
            sys.stdout.flush()
        for process in ranks:
            process.start()
        _wait(ranks, folder, time.monotonic() + timeout, timeout)
        return [pickle.loads((folder / f"{r}.result").read_bytes()) for r in range(world)]
    finally:
        for process in ranks:
            if process.is_alive():
                process.kill()
            process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(ranks: list[Any], folder: Path, deadline: float, timeout: float) -> None:
    while any(process.is_alive() for process in ranks):
        failed = [process for process in ranks if process.exitcode not in (None, 0)]
        if failed:
            time.sleep(1.0)  # the others fail on the broken connection: their tracebacks help
            break
        if time.monotonic() > deadline:
            for process in ranks:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGUSR2)
            time.sleep(0.5)
            raise RuntimeError(f"ranks hung for {timeout} s:\n" + _texts(folder, "stack", len(ranks)))
        time.sleep(0.01)
    if any(process.exitcode != 0 for process in ranks):
        codes = [process.exitcode for process in ranks]
        raise RuntimeError(f"ranks ended with {codes}:\n" + _texts(folder, "error", len(ranks)))


def _texts(folder: Path, suffix: str, world: int) -> str:
    files = [(r, folder / f"{r}.{suffix}") for r in range(world)]
    return "\n".join(f"--- rank {r}\n{file.read_text()}" for r, file in files if file.exists())


def _rank(rank: int, world: int, port: int, folder: Path, job: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_PORT=str(port))
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.register(signal.SIGUSR2, file=stack, all_threads=True)
        try:
            prepare_environment()
            start_distributed()
            result = job(*args)
            (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
            stop_distributed(together=False)
        except BaseException:
            (folder / f"{rank}.error").write_text(traceback.format_exc())
            os._exit(1)
    os._exit(0)


def free_port() -> int:
    """A port that nothing has, and that nothing is likely to take in the seconds before ranks listen on it.

    It is none of those that the system gives out by itself, and each of pytest's workers has a range of its own. Of
    several programs that ask, one gets it: a name of the kernel's stands for it until that program ends, or has got 64
    others.
    Raises RuntimeError where the whole range is taken.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    size = len(PORTS) // (WORKERS + 1)
    begin = size * (1 + int(worker) % WORKERS) if worker else 0
    for _ in range(size):
        port = PORTS[begin + next(_ports) % size]
        name = socket.socket(socket.AF_UNIX)
        with socket.socket() as probe:
            try:
                name.bind(f"\0megabus-port-{port}")
                probe.bind(("", port))
            except OSError:
                name.close()
                continue
        _taken.append(name)
        return port
    raise RuntimeError(f"no port is free from {PORTS[begin]} to {PORTS[begin + size - 1]}")
