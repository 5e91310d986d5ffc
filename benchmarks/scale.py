"""What a large world costs one rank: bytes of a growth beside the fewest that there can be, process groups, planning.

Nothing is sent: ranks are simulated one by one (`megabus simulate`). Bytes and groups are counted, so only the plan's
seconds, which are of CPU, vary from round to round.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arms import Timing
from benchmarks.comparisons import Comparison, compare
from megabus.config import RunConfig, Stage, load_config, resolve_stages
from megabus.config.precision import FP32_BYTES
from megabus.engine.startup import import_deepspeed, prepare_environment
from megabus.growth.plan import Plan, plan_between, schedule_of

ROOT = Path(__file__).resolve().parents[1]
LARGE, LARGEST = (ROOT / "configs/ngpt_70b.yaml", 1024), (ROOT / "benchmarks/ngpt_405b.yaml", 16_384)
SMALL = ((ROOT / "configs/demo.yaml", 4), (ROOT / "configs/demo.yaml", 4))
FEWEST = "the fewest that ZeRO's cuts allow it"
SECONDS, MIB = 1.0, 100  # that a rank's plan may take


def scale(rounds: int, small: bool) -> list[Comparison]:
    """Both growths of the 70B run on 1,024 ranks, and a growth to 405B on 16,384."""
    (large, world), (largest, ranks) = SMALL if small else (LARGE, LARGEST)
    rows = bytes_of_growths(load_config(large, []), world)
    prepare_environment()
    import_deepspeed()
    config = load_config(largest, [])
    stages = resolve_stages(config, ranks)
    return rows + _groups(config, stages[-1], world, ranks) + _plans(config, stages, ranks, rounds)


def bytes_of_growths(config: RunConfig, world: int) -> list[Comparison]:
    from megabus.testing.plan_bytes import least

    rows = []
    for before, after in pairwise(resolve_stages(config, world)):
        plan = plan_between(config, before, after)
        bound = least(plan, plan.growth.sent_kinds)
        what = f"bytes of a growth, {before.model.n_layers} to {after.model.n_layers} layers, {world:,} ranks"
        for way, fewest in (("taken in", bound.taken), ("given out", bound.given)):
            busiest = int(np.argmax(fewest))
            planned = Timing([_planned(config, plan, busiest, way)], 0)
            one, other = f"the busiest rank, {way}", FEWEST
            rows.append(compare(what, one, other, planned, Timing([float(fewest.max())], 0), "<= 1.02", "B"))
            mean = Timing([float(fewest.mean())], 0)
            rows.append(compare(what, other, f"the mean, {way}", Timing([float(fewest.max())], 0), mean, "", "B"))
        sent = bound.given - bound.kept
        owners, forwarded = Timing([float(sent.max())], 0), Timing([bound.forwarding], 0)
        rows.append(
            compare(
                what, "sent by the busiest owner", "by the busiest rank, with forwarding", owners, forwarded, "", "B"
            )
        )
    return rows


def _planned(config: RunConfig, plan: Plan, rank: int, way: str) -> int:
    transfers = [each for wave in schedule_of(config, plan, rank) for _, _, each in wave.transfers]
    entries = sum(len(each.piece) for each in transfers if rank == (each.dst if way == "taken in" else each.src))
    return entries * FP32_BYTES


def _groups(config: RunConfig, stage: Stage, few: int, many: int) -> list[Comparison]:
    """The last size on two worlds: groups that the busiest of three ranks is in, and what torch is asked to make."""
    from megabus.testing.simulate import in_child

    layouts = [replace(stage.layout, dp=world // (stage.layout.tp * stage.layout.pp)) for world in (few, many)]
    jobs = [(config, replace(stage, layout=layout), rank) for layout in layouts for rank in _some(layout.world)]
    made = np.array(in_child(groups_made, jobs)).reshape(2, -1, 2).max(1)
    arms = [(f"{world:,} ranks", world) for world in (many, few)]
    rows = []
    for number, what in enumerate(("process groups a rank is in", "creation calls of a rank")):
        one, other = (Timing([float(count)], 0) for count in (made[1, number], made[0, number]))
        rows.append(compare(what, arms[0][0], arms[1][0], one, other, "<= 1", "groups"))
    return rows


def groups_made(config: RunConfig, stage: Stage, rank: int) -> tuple[int, int]:
    """Groups that a rank is in once its mesh is built, and how many torch was asked for on the way."""
    import torch.distributed as dist

    from megabus.parallel.mesh import Mesh, process_groups
    from megabus.testing.simulate import fake_world

    calls, new_group = 0, dist.new_group

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return new_group(*args, **options)

    with fake_world(stage.layout.world, rank):
        dist.new_group = counted
        try:
            mesh = Mesh(stage.layout, config.train.sequence_parallel)
            if stage.layout.pp > 1:
                mesh.ends_group()  # which tied heads need
        finally:
            dist.new_group = new_group
        return process_groups(), calls


def _plans(config: RunConfig, stages: list[Stage], world: int, rounds: int) -> list[Comparison]:
    from megabus.testing.simulate import in_child, plan_growth_of

    before, after = stages[:2]
    jobs = [(config, before, after, rank) for _ in range(rounds) for rank in _some(world)]
    costs = [planned.cost for planned in in_child(plan_growth_of, jobs)]
    turns = [costs[at : at + 3] for at in range(0, len(costs), 3)]
    seconds = Timing([max(cost.cpu_seconds for cost in turn) for turn in turns], 0)
    memory = Timing([max(cost.mib for cost in turn) for turn in turns], 0)
    what, one = f"a rank's plan, 70B to 405B, {world:,} ranks", "the slowest of three ranks"
    return [
        compare(what, f"{one}, of CPU", "1 s", seconds, Timing([SECONDS] * rounds, 0), "<= 1"),
        compare(
            what, one.replace("slowest", "largest"), "100 MiB", memory, Timing([float(MIB)] * rounds, 0), "<= 1", "MiB"
        ),
    ]


def _some(world: int) -> list[int]:
    return [0, world // 2, world - 1]
