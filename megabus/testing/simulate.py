"""One rank of a large world without the others: torch's fake process group, and parameters on the meta device.

What a rank reckons and builds before it holds a weight can so be run for any rank of any world on one core. Nothing is
sent and nothing is computed with.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

from megabus.config import RunConfig, Stage
from megabus.config.precision import FP32_BYTES
from megabus.engine.fragments import own_parameters
from megabus.engine.startup import stop_distributed
from megabus.estimate.growth import messages
from megabus.growth.plan import plan_between, schedule_of
from megabus.model.decoder import Decoder
from megabus.model.params import spec_of
from megabus.parallel.mesh import Mesh, process_groups, reuse_process_groups
from megabus.parallel.placement import Placement
from megabus.parallel.topology import layers_at


@dataclass(frozen=True)
class Cost:
    """What a rank's work took: seconds on the clock and of CPU, and MiB of resident memory beside the imports."""

    seconds: float
    cpu_seconds: float
    mib: float


@dataclass(frozen=True)
class Built:
    """A stage of the run as one rank builds it: parameters that it computes with and masters that it owns (entries),
    process groups that it makes; what it took."""

    parameters: int
    masters: int
    groups: int
    cost: Cost


@dataclass(frozen=True)
class Planned:
    """A growth as one rank plans it: messages, bytes, waves, and what it took."""

    sent_messages: int
    received_messages: int
    sent: int
    received: int
    kept: int
    receivers: int  # other ranks that it may send to
    waves: int
    cost: Cost


@contextmanager
def fake_world(world: int, rank: int, backend: str = "fake") -> Iterator[None]:
    """torch.distributed and DeepSpeed as `rank` of `world` finds them; collectives return at once and change nothing.

    One at a time, in a process that is in no other world; DeepSpeed is to be imported (`engine.startup`). backend:
    another than of the CPU's tensors, such as "cpu:fake,gpu:fake".
    """
    import deepspeed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized(), "this process has a world already"
    before = {key: os.environ.get(key) for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world))
    try:
        dist.init_process_group(backend, store=FakeStore(), rank=rank, world_size=world)
        deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
        reuse_process_groups(timedelta(minutes=1))
        yield
    finally:
        stop_distributed(together=False)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def meta_stage(config: RunConfig, stage: Stage, mesh: Mesh) -> Decoder:
    """The layers of a rank with their parameters on the meta device: shapes and declarations, no storage.

    Raises RuntimeError where they are not the shards that `Placement` computes, which growth and checkpoints rest on.
    """
    layers = layers_at(stage.model.n_layers, stage.layout.pp, mesh.at.pp)
    with torch.device("meta"):
        decoder = Decoder(stage.model, layers, mesh.tp, config.train.recompute)
    placement = Placement(stage.model, stage.layout)
    own = own_parameters(decoder, placement, mesh.rank)
    held = {spec_of(parameter).name: parameter.numel() for parameter in own}
    expected = {name: len(placement.shard(name, mesh.rank)) for name in placement.names(mesh.at.pp)}
    if held != expected:
        wrong = sorted(name for name in held.keys() | expected.keys() if held.get(name) != expected.get(name))
        raise RuntimeError(f"rank {mesh.rank} builds other shards than its placement says: {wrong[:3]}")
    return decoder


def build(config: RunConfig, stage: Stage, rank: int) -> Built:
    """Build a rank's process groups and its layers for a stage of the run."""
    took = _cost()
    with fake_world(stage.layout.world, rank):
        mesh = Mesh(stage.layout, config.train.sequence_parallel)
        decoder = meta_stage(config, stage, mesh)
        groups = process_groups()
    placement = Placement(stage.model, stage.layout)
    masters = sum(len(piece) for piece in placement.owned(rank))
    return Built(sum(p.numel() for p in decoder.parameters()), masters, groups, took())


def plan_growth_of(config: RunConfig, before: Stage, after: Stage, rank: int) -> Planned:
    """Plan a growth for one rank, from nothing."""
    took = _cost()
    plan = plan_between(config, before, after)
    waves = schedule_of(config, plan, rank)
    cost = took()
    sent, received = messages(waves, rank)
    transfers = [each for wave in waves for _, _, each in wave.transfers]
    kept = FP32_BYTES * sum(len(each.piece) for each in transfers if each.src == each.dst)
    others = len(plan.receivers(rank))
    return Planned(len(sent), len(received), sum(sent), sum(received), kept, others, len(waves), cost)


def in_child(job: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """`job(*each)` for each of the arguments, one after the other, each in a forked process of its own: with its own
    caches, memory and world."""
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(job, arguments, chunksize=1)


def _cost() -> Callable[[], Cost]:
    """The cost from here to the call of what is returned. Of memory only new peaks show, so it belongs at the start of
    a process (`in_child`)."""
    start = (time.perf_counter(), time.process_time(), peak_mib())

    def took() -> Cost:
        now = (time.perf_counter(), time.process_time(), peak_mib())
        return Cost(*(after - before for before, after in zip(start, now, strict=True)))

    return took


def peak_mib() -> float:
    """The most resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
