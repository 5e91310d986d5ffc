"""Start torch.distributed and DeepSpeed in this process, with or without GPUs, with or without a compiler."""

from __future__ import annotations

import faulthandler
import functools
import gc
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from megabus.errors import UserError

LAST_WORDS = timedelta(hours=1)  # that the others wait for what rank 0 makes of a run that has ended


def prepare_environment(deterministic: bool = False) -> None:
    """Settings that must stand before torch is imported, and a rank's, where no launcher has made them.
    deterministic: `train.deterministic`."""
    prepare_torch(deterministic)
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if os.environ["WORLD_SIZE"] == "1":  # without a launcher: any free port, so that several runs can go on at once
        os.environ.setdefault("MASTER_PORT", "0")
    os.environ.setdefault("MASTER_PORT", "29500")


def prepare_torch(deterministic: bool = False) -> None:
    """Those of all ranks alike."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS then adds up in one order
        os.environ.setdefault("NCCL_ALGO", "Ring")  # of all algorithms between which NCCL chooses
    # One compute thread a rank: ranks share the cores, and thread counts change summation order.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name of the same
        # Growth frees tensors of one size and asks for others: segments that can be extended leave no holes.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


@contextmanager
def importing() -> Iterator[None]:
    """What the block imports is not searched for garbage meanwhile, which takes a tenth of a start's processor time."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()


def on_gpu() -> bool:
    """Whether ranks compute on NVIDIA GPUs; DS_ACCELERATOR=cpu keeps them off."""
    import torch

    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


@importing()
def import_deepspeed() -> None:
    """Import DeepSpeed quietly, on the CPU where there is no GPU."""
    gpu = on_gpu()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore", category=FutureWarning)
    with _compiling_at_first_call():
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  else an engine imports it
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    _leave_peaks_alone()
    _send_no_weights()
    _add_without_copies()
    if not gpu:
        # On CPUs DeepSpeed would compile a shared-memory op here: a minute with g++, a crash without.
        # The attribute deepspeed.comm.torch is torch itself, so the module is found by its full name.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def _leave_peaks_alone() -> None:
    """Keep DeepSpeed from setting counters of peak memory back: its optimizers do at every build, one of them on rank 0
    alone, to print what they take. A run tells the most that it has taken since it began."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage_1_and_2

    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    stage_1_and_2.empty_cache = lambda: get_accelerator().empty_cache()


def _send_no_weights() -> None:
    """Keep DeepSpeed from sending the model of a group's first rank to the others, a message a parameter, whenever an
    engine is made: weights are zeros until all ranks have written their masters, and are then made of these."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    DeepSpeedEngine._broadcast_model = lambda self: None


def _add_without_copies() -> None:
    """Let DeepSpeed's optimizer for bf16 add each gradient into its fp32 sum as it is. It would make an fp32 copy of it
    before: another kernel, and 18 bytes an entry in place of 10, for the same bits."""
    import torch
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    @torch.no_grad()
    def add(self: Any, lp: Any, group_idx: int, param_idx: int, clear_lp_grads: bool) -> None:
        assert not clear_lp_grads, "gradients go into their sums at once (`immediate_grad_update`)"
        if lp.grad is None:
            return
        hp_grad = self.fp32_groups_gradients[group_idx][param_idx]
        hp_grad.add_(lp.grad.view(hp_grad.shape))
        lp._hp_grad = hp_grad
        self.fp32_groups_has_gradients[group_idx][param_idx] = True

    BF16_Optimizer._update_hp_grad = add


@contextmanager
def _compiling_at_first_call() -> Iterator[None]:
    """What torch.compile decorates in the block is compiled when it is first called.

    DeepSpeed decorates the Muon optimizer when it is imported, and torch then imports Inductor for it: a quarter of a
    start's processor time, for functions that megabus never calls.
    """
    import torch

    compile_now: Callable[..., Any] = torch.compile

    def compile_later(model: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if model is None:
            return lambda decorated: compile_later(decorated, **options)
        compiled = functools.cache(lambda: compile_now(model, **options))
        return functools.wraps(model)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


def start_distributed(timeout: timedelta = timedelta(minutes=10)) -> None:
    """Join the process group that the launcher's environment describes: NCCL on GPUs, gloo on CPUs."""
    with importing():
        import torch

    from megabus.engine.hardware import check_no_gpu_is_missed

    check_no_gpu_is_missed()
    gpu = on_gpu()
    if gpu:
        _check_gpus(torch.cuda.device_count())
    import_deepspeed()
    import deepspeed
    from torch.distributed.rendezvous import rendezvous

    from megabus.parallel.mesh import reuse_process_groups
    from megabus.parallel.reach import check_reach

    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist = torch.distributed
    # A rank that dies while ranks meet would keep the others for several times the time-out.
    at_most = functools.partial(faulthandler.dump_traceback_later, timeout.total_seconds() + 5, exit=True)
    at_most()
    try:
        backend = "nccl" if gpu else "gloo"
        if not dist.is_initialized():
            store, rank, world = next(iter(rendezvous("env://", timeout=timeout)))
            store.set_timeout(timeout)
            at_most()
            check_reach(store, rank, world, timeout)  # gloo connects all ranks at once
            at_most()
            # Not by DeepSpeed, which binds NCCL to the device: then each group is split off the world's communicator,
            # for which all ranks have to come, and a world has as many groups as ranks.
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
        # NCCL connects a group's ranks when it is first used, all of them: what follows may be between some alone. And
        # gloo's ranks connect one by one: a rank that left at once would look to a slower one like one that has died.
        dist.all_reduce(torch.zeros(1, device="cuda" if gpu else "cpu"))
    except torch.distributed.DistNetworkError as error:
        address, said = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).splitlines()[0]
        problem, remedy = f"the ranks cannot meet there ({said})", "name a free port to the launcher"
        if "timed out" in said:  # the port is not to blame: nobody answers there
            problem = f"rank 0 has not answered there in {timeout.total_seconds():g} s"
            remedy = "look whether its machine has started it and can be reached, or raise faults.hang_timeout"
        raise UserError("MASTER_ADDR:MASTER_PORT", address, problem, remedy) from error
    except torch.distributed.DistStoreError as error:
        came = re.search(r"\d+/\d+ clients joined", str(error))
        problem = f"ranks are to come, and have not all in {timeout.total_seconds():g} s"
        problem += f" ({came.group()})" if came else ""
        remedy = "look whether every machine has started its ranks and can reach MASTER_ADDR"
        raise UserError("WORLD_SIZE", os.environ["WORLD_SIZE"], problem, remedy) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    reuse_process_groups(timeout)


def local_ranks() -> int:
    """Ranks on this machine, as the launcher says."""
    environ = os.environ
    return int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or environ.get("WORLD_SIZE") or 1)


def _check_gpus(count: int) -> None:
    """Every rank of this machine needs a GPU of its own; all of them know if one goes without."""
    local = local_ranks()
    if local > count:
        problem = f"exceeds the {count} GPU(s) of this machine"
        raise UserError("ranks on this machine", local, problem, f"launch {count}, or set DS_ACCELERATOR=cpu")


def stop_distributed(together: bool = True) -> None:
    """Leave the process group: when all ranks do, so that what a launcher says of those that have ended does not stand
    among what rank 0 still says. together=False: at once."""
    import torch.distributed as dist

    from megabus.parallel.mesh import forget_process_groups

    if dist.is_initialized():
        if together:
            # Of its own time-out: rank 0 may draw longer than a rank that trains may hang.
            dist.barrier(dist.new_group(backend="gloo", timeout=LAST_WORDS))
        dist.destroy_process_group()
    forget_process_groups()
