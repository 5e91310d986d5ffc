"""Build a run's stages and plan its growths as single ranks of a large world do, on one core and without the others.

  megabus simulate --config configs/ngpt_70b.yaml --world 1024              # the first, middle and last rank
  megabus simulate --config configs/ngpt_70b.yaml --world 1024 --rank 7 --rank 900
  megabus simulate --config configs/ngpt_70b.yaml --world 1024 --all-ranks  # do all ranks' plans fit together?

Layers have shapes and no weights, so that a small machine is enough.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from megabus.command import Parser
from megabus.config import RunConfig, Stage, load_config, resolve_stages
from megabus.engine.startup import import_deepspeed, prepare_environment
from megabus.errors import UserError
from megabus.pathname import path_of

if TYPE_CHECKING:
    import numpy as np

    from megabus.testing.simulate import Cost

MIB = 2**20


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="megabus simulate", description=__doc__)
    parser.add_argument("--config", type=path_of, required=True, help="YAML of a run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="dotted overrides of the file")
    parser.add_argument("--world", type=int, required=True, help="ranks of the run")
    parser.add_argument("--rank", type=int, action="append", help="a rank to simulate; may be given again")
    parser.add_argument("--all-ranks", action="store_true", help="plan the growths for every rank and compare")
    args = parser.parse_intermixed_args(argv)
    config = load_config(args.config, args.overrides)
    if args.world < 1:
        raise UserError("--world", args.world, "is no number of ranks", "give 1 or more")
    stages = resolve_stages(config, args.world)
    ranks = sorted({0, args.world // 2, args.world - 1}) if args.rank is None else args.rank
    for rank in ranks:
        if not 0 <= rank < args.world:
            raise UserError("--rank", rank, f"is none of {args.world} ranks", f"give 0 to {args.world - 1}")
    if args.all_ranks and len(stages) == 1:
        raise UserError("--all-ranks", args.config, "has no growth to plan", "name a run with growth.stages")
    os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # nothing is computed, so no GPU is wanted
    prepare_environment()
    import_deepspeed()  # once for all simulated ranks, which are forks; after the checks, for it takes seconds
    from megabus.testing.simulate import peak_mib

    print(f"imports take {peak_mib():.0f} MiB, which every figure below comes on top of\n")
    _print_built(config, stages, ranks)
    _print_planned(config, stages, ranks)
    return _check_all(config, stages) if args.all_ranks else 0


def _print_built(config: RunConfig, stages: Sequence[Stage], ranks: Sequence[int]) -> None:
    from megabus.testing.simulate import build, in_child

    print("construction: process groups, and layers on the meta device")
    print(f"{'layout':<16} {'rank':>6} {'parameters':>12} {'masters':>11} {'groups':>7} {_cost_header()}")
    jobs = [(config, stage, rank) for stage in stages for rank in ranks]
    for (_, stage, rank), built in zip(jobs, in_child(build, jobs), strict=True):
        print(
            f"{stage.layout!s:<16} {rank:>6} {built.parameters:>12,} {built.masters:>11,} {built.groups:>7} "
            f"{_cost(built.cost)}"
        )


def _print_planned(config: RunConfig, stages: Sequence[Stage], ranks: Sequence[int]) -> None:
    from megabus.testing.simulate import in_child, plan_growth_of

    print("\nplans of growths: bytes in MiB")
    print(
        f"{'layouts':<32} {'rank':>6} {'messages out':>12} {'in':>6} {'sent':>8} {'received':>8} {'kept':>8} "
        f"{'others':>6} {'waves':>5} {_cost_header()}"
    )
    jobs = [(config, before, after, rank) for before, after in pairwise(stages) for rank in ranks]
    for (_, before, after, rank), planned in zip(jobs, in_child(plan_growth_of, jobs), strict=True):
        print(
            f"{f'{before.layout} to {after.layout}':<32} {rank:>6} {planned.sent_messages:>12} "
            f"{planned.received_messages:>6} {planned.sent / MIB:>8.1f} {planned.received / MIB:>8.1f} "
            f"{planned.kept / MIB:>8.1f} {planned.receivers:>6} {planned.waves:>5} {_cost(planned.cost)}"
        )


def _cost_header() -> str:
    return f"{'seconds':>8} {'of CPU':>7} {'MiB':>6}"


def _cost(cost: Cost) -> str:
    return f"{cost.seconds:>8.2f} {cost.cpu_seconds:>7.2f} {cost.mib:>6.1f}"


def _check_all(config: RunConfig, stages: Sequence[Stage]) -> int:
    """Every rank's schedule of every growth, by itself and against the others'. Returns the exit code."""
    from megabus.growth.plan import plan_between, schedule_of
    from megabus.testing.plan_bytes import least
    from megabus.testing.plan_check import faults, loads

    sound = True
    for before, after in pairwise(stages):
        start, plan = time.perf_counter(), plan_between(config, before, after)
        schedules = {rank: schedule_of(config, plan, rank) for rank in range(after.layout.world)}
        found = faults(plan, schedules, plan.growth.sent_kinds)
        print(f"\n{before.layout} to {after.layout}: {', '.join(sorted(found)) or 'all ranks agree, nothing is wrong'}")
        print(f"  {len(schedules):,} ranks planned and compared in {time.perf_counter() - start:.0f} s")
        for what, load in loads(plan, schedules).items():
            print(
                f"  {what}: {load.mean / MIB:,.1f} MiB a rank, most {load.most / MIB:,.1f}; "
                f"within a role most is {load.spread:.3f} of the mean"
            )
        bound = least(plan, plan.growth.sent_kinds)
        print(
            f"  the fewest that ZeRO's cuts allow the busiest rank: taken in {bound.taken.max() / MIB:,.1f} MiB, "
            f"given out {bound.given.max() / MIB:,.1f}\n"
            f"  of them received {_most(bound.taken - bound.kept)}, sent {_most(bound.given - bound.kept)}, "
            f"and if ranks forwarded what they get, {bound.forwarding / MIB:,.1f} or more"
        )
        sound &= not found
    return 0 if sound else 1


def _most(bytes_by_rank: np.ndarray) -> str:
    mean, most = bytes_by_rank.mean(), bytes_by_rank.max()
    return f"{mean / MIB:,.1f} MiB a rank, most {most / MIB:,.1f} ({most / mean if mean else 1:.3f})"
