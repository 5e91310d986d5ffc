"""A growth of a running engine, from trigger to rebuilt engine, in the same processes and without a disk."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megabus.config import RunConfig, Stage
from megabus.engine.engine import Engine
from megabus.growth.param_growth import growth_between
from megabus.growth.plan import plan_between
from megabus.growth.redistribute import redistribute
from megabus.parallel.fragments import MOMENTS, Kind
from megabus.upload import upload


@dataclass(frozen=True)
class GrownEngine:
    """The engine after a growth, and the bytes that all ranks together sent and had already."""

    engine: Engine
    sent: int
    kept: int


def stage_engine(config: RunConfig, stage: Stage, before: Stage | None) -> Engine:
    """An engine for a stage, which knows the rows that growing from the stage `before` adds (None: it is the first).
    Collective; its weights are undefined until they are written."""
    engine = Engine(config.train, config.optimizer, stage)
    if before is not None and config.growth.boost is not None:
        growth = growth_between(config, before, stage)
        engine.boost.set_rows(growth.added)
    return engine


def grow_engine(engine: Engine, config: RunConfig, stage: Stage) -> GrownEngine:
    """Grow `engine` into `stage` and close it. Collective, at a step boundary."""
    before = engine.stage
    plan = plan_between(config, before, stage)
    means, averaged = plan.growth.means, dict(engine.averages.updates)
    kinds: tuple[Kind, ...] = plan.growth.sent_kinds if engine.optimizer_step else ("weight", *means)
    optimizer_step = engine.optimizer_step if set(MOMENTS) <= set(kinds) else 0
    owned = {piece: {kind: tensors[kind] for kind in kinds} for piece, tensors in engine.read().items()}
    engine.close()  # before the new shard is there: from now on only what is sent is left of the old one
    fragments, traffic = redistribute(plan, owned, kinds, engine.mesh.rank, config.growth.buffer_bytes)
    del owned
    grown = stage_engine(config, stage, before)
    grown.write(fragments, optimizer_step, averaged)
    totals = upload([traffic.sent, traffic.kept], grown.device)
    dist.all_reduce(totals)
    return GrownEngine(grown, *totals.tolist())
