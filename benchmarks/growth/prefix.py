"""What runs have in common is computed once: a run goes on from another's checkpoint, up to which both are the same.

A run repeats another bit for bit as long as their configurations mean the same: a larger budget changes nothing before
the learning rate falls, another manner of growing nothing before the first growth. So the other run's checkpoint of
that time is this run's own, and all it spent up to there counts as this run's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from benchmarks.growth.experiment import NOT_THE_MATHEMATICS
from megabus.checkpoint.state import SavedState, read_state
from megabus.checkpoint.store import checkpoints_of, complete, point_latest, remove
from megabus.config import RunConfig

# What does nothing before the first growth.
MANNER = ("write", "read", "channels", "depth", "moments", "boost", "rewarm", "settle")
ASIDE = (*NOT_THE_MATHEMATICS, "train", "optimizer", "growth")  # what `common` looks at by itself


@dataclass(frozen=True)
class Common:
    """Two runs are the same in stages 0 to `growths`, while they have spent less than `flops`: the smaller one's last
    state has seen an evaluation more."""

    growths: int
    flops: float

    def holds(self, state: SavedState) -> bool:
        return state.stage <= self.growths and state.progress.flops < self.flops


NOTHING = Common(-1, 0.0)


def common(done: RunConfig, new: RunConfig) -> Common:
    """How far `new` repeats `done`."""
    if done.model_dump(exclude={*ASIDE}) != new.model_dump(exclude={*ASIDE}):
        return NOTHING
    if _but(done.train, "max_flops") != _but(new.train, "max_flops") or done.optimizer != new.optimizer:
        return NOTHING
    if _order(done) != _order(new):
        return NOTHING
    flops = _constant_until(done, new)
    growths = _common_growths(done, new)
    return Common(growths, flops) if growths >= 0 else NOTHING


def _order(config: RunConfig) -> tuple[int, int, list[str]]:
    """What of stages yet to come counts from the start: the length of the data's chunks, and of the validation."""
    sizes, stages = config.train, config.growth.stages
    longest = max(sizes.seq_len, *(stage.seq_len or 0 for stage in stages), 0)
    unit = longest * lcm(sizes.micro_batch_size, *(stage.micro_batch_size or 1 for stage in stages))
    layouts = {f"{layout}" for layout in (config.layout, *(stage.layout for stage in stages)) if layout is not None}
    return longest, -(-config.eval.tokens // unit) * unit, sorted(layouts)


def _constant_until(done: RunConfig, new: RunConfig) -> float:
    """FLOPs up to which the learning rate is the same at each."""
    budgets, optimizer = (done.train.max_flops, new.train.max_flops), new.optimizer
    if budgets[0] == budgets[1]:
        return float("inf")
    flat = optimizer.schedule in ("constant", "wsd") and optimizer.warmup_share == 0
    if None in budgets or not flat or new.train.max_tokens or new.train.max_steps:
        return 0.0
    tail = optimizer.decay_share if optimizer.schedule == "wsd" else 0.0
    return min(budget for budget in budgets if budget) * (1 - tail)


def _common_growths(done: RunConfig, new: RunConfig) -> int:
    """The last stage in which both are the same; -1 if there is none."""
    a, b = done.growth, new.growth
    grow = {*MANNER, "stages", "buffer_mb"}
    watched = a.model_dump(exclude=grow) == b.model_dump(exclude=grow)
    if not b.stages:
        return 0  # nothing is watched for, and what never grows is the same until the other does
    if not watched or not a.stages:
        return -1
    if any(getattr(a, key) != getattr(b, key) for key in MANNER):
        return 0
    same = 0
    for one, other in zip(a.stages, b.stages, strict=False):
        if one != other:
            break
        same += 1
    if len(a.stages) != len(b.stages) and same == min(len(a.stages), len(b.stages)):
        same -= 1  # where one of them ends, the other may grow again
    return same


def _but(section: Any, *keys: str) -> dict[str, Any]:
    return section.model_dump(exclude=set(keys))


def go_on_from_others(run_dir: Path, config: RunConfig, others: Iterable[tuple[Path, RunConfig]]) -> Path | None:
    """Give a run that has not begun the furthest checkpoint that is its own in all but name; that, or None."""
    best: tuple[float, Path, Path] | None = None
    for other_dir, other in others:
        shared = common(other, config)
        for folder in complete(checkpoints_of(other_dir)):
            state = read_state(folder)
            if shared.holds(state) and (best is None or state.progress.flops > best[0]):
                best = (state.progress.flops, folder, other_dir)
    if best is None:
        return None
    _, folder, other_dir = best
    root = checkpoints_of(run_dir)
    root.mkdir(parents=True, exist_ok=True)
    shutil.copy(other_dir / "metrics.jsonl", run_dir)  # what came after the checkpoint is taken back by resuming
    target = root / folder.name
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a start that was killed here
    shutil.copytree(folder, partial, copy_function=os.link)  # a checkpoint never changes
    partial.rename(target)  # last, for with it the run has begun
    point_latest(target)
    return folder


def keep_what_others_may_need(run_dir: Path, config: RunConfig, newest: int = 1) -> None:
    """Keep a run's `newest` states, and of every stage the last one before the learning rate fell."""
    tail = config.optimizer.decay_share if config.optimizer.schedule == "wsd" else 0.0
    limit = (config.train.max_flops or 0.0) * (1 - tail)
    kept: set[int] = set()
    for folder in complete(checkpoints_of(run_dir))[newest:]:
        state = read_state(folder)
        if state.progress.flops < limit and state.stage not in kept:
            kept.add(state.stage)
        else:
            remove(folder)
