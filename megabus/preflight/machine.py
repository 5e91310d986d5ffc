"""A rank's device: what it is, how fast it computes, and whether its share of the training state fits."""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from megabus.config import RunConfig, Stage
from megabus.config.stages import by_batches, stage_section
from megabus.errors import UserError
from megabus.estimate.layouts import pipeline_memory
from megabus.estimate.memory import states_at
from megabus.parallel.placement import Placement
from megabus.parallel.topology import coordinate, ranks_text
from megabus.preflight.findings import Finding, odd_ones, refused, size_text, warned
from megabus.preflight.slow import usual

SLOW = 2.0  # times below the usual speed; two ranks that share a core are no reason to warn
MATMULS = 20


@dataclass(frozen=True)
class Machine:
    """What a rank computes on. need: bytes that the rank takes there at least, in the largest of its stages."""

    host: str
    device: str
    count: int  # GPUs of the machine, or its cores
    free: int  # bytes: of this rank's GPU, or of the machine's memory, which its ranks share
    need: int
    stage: int  # the stage that needs it
    on_gpu: bool
    main_free: int = 0  # bytes of the machine's memory, where ranks compute on GPUs
    snapshot: int = 0  # and bytes that the rank copies there for a checkpoint, in the largest of its stages


def read_machine(config: RunConfig, stages: Sequence[Stage], rank: int, host: str) -> Machine:
    """host: what the machine is called."""
    need, stage = max((least_bytes(config, stage, rank), stage.index) for _, stage in by_batches(stages))
    if get_accelerator().device_name() == "cuda":
        device, count, free = torch.cuda.get_device_name(), torch.cuda.device_count(), torch.cuda.mem_get_info()[0]
        copied = max(snapshot_bytes(config, stage, rank) for stage in stages)
        return Machine(host, device, count, free, need, stage, True, free_memory(), copied)
    cores = len(os.sched_getaffinity(0))
    return Machine(host, processor(), cores, free_memory(), need, stage, False)


def least_bytes(config: RunConfig, stage: Stage, rank: int) -> int:
    """Bytes that a rank's weights, gradients, masters and moments take in a stage: no run takes less.

    Activations, buffers and what the libraries need come on top.
    """
    at = coordinate(stage.layout, rank)
    held = states_at(config.train, stage, Placement(stage.model, stage.layout), at.pp, at.tp, at.dp)
    return held.states + max(held.gradients, held.masters)  # sums of the gradients of what is owned, at least


def snapshot_bytes(config: RunConfig, stage: Stage, rank: int) -> int:
    """Bytes of the masters and moments that a rank copies aside when it saves."""
    at = coordinate(stage.layout, rank)
    held = states_at(config.train, stage, Placement(stage.model, stage.layout), at.pp, at.tp, at.dp)
    return held.masters + held.moments


def expected_bytes(config: RunConfig, stages: Sequence[Stage], on_gpu: bool) -> list[int]:
    """Bytes that each rank is estimated to take, activations and buffers included, in the largest of its stages."""
    most = [0] * stages[0].layout.world
    for _, stage in by_batches(stages):
        by_pp = [memory.total for memory in pipeline_memory(config, stage, on_gpu)]
        most = [max(known, by_pp[coordinate(stage.layout, rank).pp]) for rank, known in enumerate(most)]
    return most


def free_memory() -> int:
    """Bytes of the machine's memory that its ranks may still take, less where their control group allows less."""
    free = psutil.virtual_memory().available
    root = Path("/sys/fs/cgroup")
    try:
        own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::/"))
    except (OSError, StopIteration):  # no Linux, or the first version of control groups
        return free
    folder = root / own.removeprefix("0::/")
    for group in (folder, *folder.parents):
        if root not in (group, *group.parents):
            break
        try:
            limit = (group / "memory.max").read_text().strip()
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        except (OSError, KeyError):  # the root has no limit, and not every container shows them
            continue
        if limit != "max":
            free = min(free, int(limit) - used)
    return max(free, 0)


def processor() -> str:
    """The CPU's name as Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def speed(device: torch.device) -> float:
    """FLOP/s of the fastest of some matrix products, in what GPUs or CPUs train in. A few ms."""
    n, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    a, b = torch.ones(n, n, device=device, dtype=dtype), torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(MATMULS):
        get_accelerator().synchronize()
        begun = time.perf_counter()
        matmul(a, b)
        get_accelerator().synchronize()
        best = min(best, time.perf_counter() - begun)
    return 2 * n**3 / best


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


def machine_rows(ranks: Sequence[Machine], expected: Sequence[int]) -> list[Finding]:
    """expected: of every rank, its `expected_bytes`."""
    return [_devices_row(ranks), _memory_row(ranks, expected), *_snapshot_rows(ranks)]


def _devices_row(ranks: Sequence[Machine]) -> Finding:
    common, odd = odd_ones([(machine.device, machine.count) for machine in ranks])
    free = [machine.free for machine in ranks]
    least, most = size_text(min(free)), size_text(max(free))
    text = f"{common[1]} x {common[0]} a machine, {least if least == most else f'{least} to {most}'} free"
    if not odd:
        return Finding("devices", text)
    other = ranks[odd[0]]
    alike = [rank for rank in odd if (ranks[rank].device, ranks[rank].count) == (other.device, other.count)]
    return warned("devices", f"{other.count} x {other.device} on {ranks_text(alike)} ({other.host}), else {text}")


def _memory_row(ranks: Sequence[Machine], expected: Sequence[int]) -> Finding:
    """On GPUs each rank has its own memory; on CPUs the ranks of a machine share it. What is needed at least is refused
    where it does not fit, an estimate of all of it is a warning."""
    places: dict[object, list[int]] = defaultdict(list)
    for rank, machine in enumerate(ranks):
        places[(machine.host, rank) if machine.on_gpu else machine.host].append(rank)
    tightest, row = -1.0, Finding("memory", "")
    for members in places.values():
        need, free = sum(ranks[rank].need for rank in members), min(ranks[rank].free for rank in members)
        largest = max((ranks[rank] for rank in members), key=lambda machine: machine.need)
        where = f"{ranks_text(members)} ({largest.host})"
        what = f"weights, gradients, masters and moments of stage {largest.stage} on {where}"
        if need > free:
            problem = f"{what} take {size_text(need)} at least, and {size_text(free)} are free"
            remedy = "use more ranks, a higher tp or pp, or a smaller model"
            return refused("memory", UserError(stage_section(largest.stage), f"stage {largest.stage}", problem, remedy))
        about = sum(expected[rank] for rank in members)
        if about / free > tightest:
            rest = f"some {size_text(about)} with activations and buffers"
            text = f"{what} take {size_text(need)} at least, {rest}; {size_text(free)} are free"
            tightest, row = about / free, warned("memory", text) if about > free else Finding("memory", text)
    return row


def _snapshot_rows(ranks: Sequence[Machine]) -> list[Finding]:
    """Of the machine with GPUs whose main memory the snapshots of its ranks fill most; none without GPUs. What takes it
    now may be gone by then, so it is a warning at most."""
    places: dict[str, list[int]] = defaultdict(list)
    for rank, machine in enumerate(ranks):
        if machine.on_gpu:
            places[machine.host].append(rank)
    if not places:
        return []

    def filled(members: list[int]) -> tuple[int, int]:
        return sum(ranks[rank].snapshot for rank in members), min(ranks[rank].main_free for rank in members)

    tightest = max(places.values(), key=lambda members: filled(members)[0] / max(1, filled(members)[1]))
    need, free = filled(tightest)
    text = f"snapshots of {ranks_text(tightest)} ({ranks[tightest[0]].host}) take {size_text(need)} of main memory, of "
    text += f"which {size_text(free)} are free"
    return [warned("main memory", text) if need > free else Finding("main memory", text)]


def slow_ranks(speeds: Sequence[float], devices: Sequence[str]) -> list[int]:
    """Ranks far slower than others with the same kind of device."""
    usuals = {kind: usual([s for s, d in zip(speeds, devices, strict=True) if d == kind]) for kind in set(devices)}
    return [rank for rank, s in enumerate(speeds) if s * SLOW < usuals[devices[rank]]]


def compute_row(speeds: Sequence[float], machines: Sequence[Machine]) -> Finding:
    slow = slow_ranks(speeds, [machine.device for machine in machines])
    text = f"{min(speeds) / 1e9:.1f} to {max(speeds) / 1e9:.1f} GFLOP/s a rank"
    if not slow:
        return Finding("compute", text)
    hosts = ", ".join(sorted({machines[rank].host for rank in slow}))
    return warned("compute", f"{ranks_text(slow)} ({hosts}) slow: {text}, most {usual(speeds) / 1e9:.1f}")
