"""Which layouts of a world a stage could have: all that megabus accepts, by predicted time, as far as they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megabus.config import Layout, RunConfig, Stage, resolve_stages
from megabus.config.after_growth import AFTER_GROWTH
from megabus.errors import UserError
from megabus.estimate.devices import Device
from megabus.estimate.memory import RankMemory, held_copies, memory_at, states_at
from megabus.estimate.step_time import StepTime, step_time
from megabus.parallel.placement import Placement

MICRO_BATCHES = (1, 2, 4)  # sizes tried beside the stage's own
FULL = 2**15  # tokens of a micro batch: a GPU is busy with fewer
MOST = 64  # times as many ranks as were asked for are tried, where no layout of these fits


@dataclass(frozen=True)
class Choice:
    """A stage in some layout, with or without `train.recompute`; memory is that of its fullest rank."""

    stage: Stage
    time: StepTime
    memory: RankMemory
    recompute: bool

    def __str__(self) -> str:
        recompute = str(self.recompute).lower()
        return f"{self.stage.layout} with micro_batch_size {self.stage.micro_batch_size}, recompute {recompute}"


def pipeline_memory(config: RunConfig, stage: Stage, on_gpu: bool) -> list[RankMemory]:
    """Of every pipeline rank's fullest rank: its last tensor-parallel one, which has most of the vocabulary."""
    placement, last = Placement(stage.model, stage.layout), stage.layout.tp - 1
    held = held_copies(config, stage)
    ranks = range(stage.layout.pp)
    return [memory_at(config.train, stage, placement, pp, last, held=held, on_gpu=on_gpu) for pp in ranks]


def fullest(config: RunConfig, stage: Stage, placement: Placement, room: float, on_gpu: bool) -> RankMemory | None:
    """The memory of the fullest rank, or None where one does not fit into `room` bytes.

    Only the two ends of a pipeline are looked at: the first rank has the embedding, most micro batches in flight and
    no fewer layers than any, the last one has the head.
    """
    worst = None
    for pp in sorted({0, stage.layout.pp - 1}):
        at = (config.train, stage, placement, pp, stage.layout.tp - 1, 0, held_copies(config, stage))
        if states_at(*at).total > room or (memory := memory_at(*at, on_gpu)).total > room:
            return None
        worst = memory if worst is None or memory.total > worst.total else worst
    return worst


def micro_batches(stage: Stage) -> list[int]:
    """The sizes that are tried."""
    return sorted({*MICRO_BATCHES, stage.micro_batch_size})


def candidates(config: RunConfig, stage: Stage, device: Device) -> Iterator[Stage]:
    """Every layout of the same world with each micro batch size, as far as the checks of a run pass; tensor parallelism
    within nodes."""
    for layout in _layouts(stage.layout.world, device):
        for micro in micro_batches(stage):
            try:
                yield _restaged(config, stage, layout, micro)
            except UserError:
                continue


def _layouts(world: int, device: Device) -> Iterator[Layout]:
    for tp in _divisors(world):
        if tp > device.nodes_of:
            break
        for pp in _divisors(world // tp):
            yield Layout(tp, pp, world // (tp * pp))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _restaged(config: RunConfig, stage: Stage, layout: Layout, micro: int) -> Stage:
    """The stage in another layout, through the checks of a run that consists of it. Raises `UserError`."""
    batch = {"seq_len": stage.seq_len, "micro_batch_size": micro, "global_batch_size": stage.global_batch_size}
    corpora = [corpus.model_copy(update={"weight": 1.0}) for corpus in config.data.train]  # no phase weighs them
    alone = config.model_copy(
        update={
            "model": stage.model,
            "layout": config.layout.model_copy(update={"tp": layout.tp, "pp": layout.pp, "dp": layout.dp}),
            "train": config.train.model_copy(update=batch | {"phases": []}),
            "data": config.data.model_copy(update={"train": corpora}),
            "optimizer": config.optimizer.model_copy(update={"transfer": None}),  # the stage's model has followed it
            "growth": config.growth.model_copy(
                update={"stages": [], **dict.fromkeys(("max_tokens", "max_flops", *AFTER_GROWTH))}
            ),
        }
    )
    return replace(resolve_stages(alone, layout.world)[0], index=stage.index)


@dataclass(frozen=True)
class Ranking:
    """best: the fastest that fit, fastest first; accepted: how many layouts and micro batch sizes pass the checks;
    own: the configured one's place among those that fit, from 1, or None where it does not fit."""

    best: list[Choice]
    accepted: int
    own: int | None


def rank_layouts(config: RunConfig, stage: Stage, device: Device, top: int) -> Ranking:
    """Each layout once, with its fastest micro batch size that fits (of equals the largest, which real kernels like
    best); the configured one with its own where that fits."""
    placements: dict[Layout, Placement] = {}
    timed = []
    for choice in candidates(config, stage, device):
        placement = placements.setdefault(choice.layout, Placement(choice.model, choice.layout))
        timed.append((step_time(config, choice, placement, device), choice))
    timed.sort(key=lambda pair: (pair[0].total, -pair[1].micro_batch_size))
    room = device.memory - device.reserve
    own = fullest(config, stage, Placement(stage.model, stage.layout), room, device.on_gpu)
    mine = step_time(config, stage, Placement(stage.model, stage.layout), device).total
    best: list[Choice] = []
    taken: set[Layout] = set()
    faster = 0
    for time, choice in timed:
        undecided = own is not None and time.total < mine
        if len(best) >= top and not undecided:
            break
        if choice.layout in taken:
            continue
        if own is not None and choice.layout == stage.layout and choice.micro_batch_size != stage.micro_batch_size:
            continue
        memory = fullest(config, choice, placements[choice.layout], room, device.on_gpu)
        if memory is None:
            continue
        taken.add(choice.layout)
        faster += undecided and choice.layout != stage.layout
        if len(best) < top:
            best.append(Choice(choice, time, memory, config.train.recompute))
    return Ranking(best, len(timed), None if own is None else faster + 1)


def settings(config: RunConfig, stage: Stage, layout: Layout, device: Device) -> Choice | None:
    """The fastest micro batch size and `train.recompute` with which the stage fits in a layout, of equals the largest
    micro batch; None where nothing fits. Micro batches are the stage's own size and doublings of 1 up to as many tokens
    as keep a GPU busy."""
    placement, room, found = Placement(stage.model, layout), device.memory - device.reserve, []
    doublings = range(max(1, FULL // stage.seq_len).bit_length())
    sizes = sorted({stage.micro_batch_size, *(1 << doubled for doubled in doublings)}, reverse=True)
    for recompute in (False, True):
        train = config.train.model_copy(update={"recompute": recompute})
        other = config.model_copy(update={"train": train})
        for micro in sizes:
            try:
                choice = _restaged(other, stage, layout, micro)
            except UserError:
                continue
            if (memory := fullest(other, choice, placement, room, device.on_gpu)) is None:
                continue
            found.append(Choice(choice, step_time(other, choice, placement, device), memory, recompute))
            if layout.pp == 1:
                break  # smaller ones are no faster: they fill no pipeline
    return min(found, key=lambda one: (one.time.total, -one.stage.micro_batch_size), default=None)


def that_fit(config: RunConfig, stage: Stage, device: Device, count: int) -> list[Choice]:
    """So many layouts that fit with their best settings, fastest first: of the stage's world, and then of twice as many
    ranks, and so on."""
    found: list[Choice] = []
    world = stage.layout.world
    for ranks in (world << doublings for doublings in range(MOST.bit_length())):
        every = (settings(config, stage, layout, device) for layout in _layouts(ranks, device))
        found += sorted((one for one in every if one is not None), key=lambda one: one.time.total)
        if len(found) >= count:
            break
    return found[:count]
