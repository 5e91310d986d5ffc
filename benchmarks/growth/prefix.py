"""What runs have in common is computed once: a run goes on from another's checkpoint, up to which both are the same.

A run repeats another bit for bit as long as their configurations mean the same: a larger budget changes nothing before
the learning rate falls, another manner of growing nothing before the first growth, one growth more nothing before that
growth. So the other run's checkpoint of that time is this run's own, and all it spent up to there counts as this run's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.growth.experiment import NOT_THE_MATHEMATICS
from megabus.checkpoint.state import SavedState, read_state
from megabus.checkpoint.store import checkpoints_of, complete, point_latest, remove
from megabus.config import RunConfig, resolve_stages
from megabus.config.schema import GrowthConfig
from megabus.data.order import align_up
from megabus.kappa.monitor import cap_is_reached
from megabus.train.horizon import at_horizon

# What does nothing before the first growth.
MANNER = ("write", "read", "channels", "depth", "moments", "boost", "rewarm", "settle")
Cap = tuple[int | None, float | None]  # tokens and FLOPs of a stage; None where there is none
ASIDE = (*NOT_THE_MATHEMATICS, "train", "optimizer", "growth")  # what `common` looks at by itself


@dataclass(frozen=True)
class Common:
    """Two runs are the same in stages 0 to `growths`, while they have spent less than `flops`: the smaller one's last
    state has seen an evaluation more. `cap`: tokens and FLOPs with which the new one leaves the last of these stages,
    where the other one stays longer."""

    growths: int
    flops: float
    cap: Cap = (None, None)

    def holds(self, state: SavedState) -> bool:
        now = state.progress
        left = cap_is_reached(now.tokens - now.stage_tokens, now.flops - now.stage_flops, *self.cap)
        return state.stage <= self.growths - left and now.flops < self.flops


NOTHING = Common(-1, 0.0)


def common(done: RunConfig, new: RunConfig) -> Common:
    """How far `new` repeats `done`."""
    if done.model_dump(exclude={*ASIDE}) != new.model_dump(exclude={*ASIDE}):
        return NOTHING
    if _but(done.train, "max_flops") != _but(new.train, "max_flops") or done.optimizer != new.optimizer:
        return NOTHING
    if _order(done) != _order(new) or _horizon(done) != _horizon(new):
        return NOTHING
    growths, cap = _common_growths(done.growth, new.growth, done.train == new.train)
    return Common(growths, _constant_until(done, new), cap) if growths >= 0 else NOTHING


def _order(config: RunConfig) -> tuple[int, int]:
    """What of stages yet to come counts from the start: tokens of the data's chunks, and of a validation."""
    longest = max(config.train.seq_len, *(stage.seq_len or 0 for stage in config.growth.stages), 0)
    return longest, align_up(config.eval.tokens, longest)


def _horizon(config: RunConfig) -> float | None:
    """The rate of the first stage where `optimizer.transfer.steps` makes it depend on all that is planned: budgets,
    caps and later stages. One factor is for all stages, whose rates are the same before it."""
    tuned = config.optimizer.transfer
    if tuned is None or tuned.steps is None:
        return None
    return at_horizon(config, resolve_stages(config, world_size=1))[0].lr


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


def _common_growths(done: GrowthConfig, new: GrowthConfig, same_budget: bool) -> tuple[int, Cap]:
    """The last stage in which both are the same, -1 if there is none, and the cap that `new` has there alone."""
    forever: Cap = (None, None)
    watched = done.trigger == new.trigger or not done.stages or not new.stages
    mannered = all(getattr(done, key) == getattr(new, key) for key in MANNER)
    for stage in count():
        if stage and not (mannered and _size(done, stage) == _size(new, stage)):
            return stage - 1, forever
        if stage == len(new.stages):  # it never leaves the stage, and a state of `done` has not left it yet
            return stage, forever
        if stage < len(done.stages) and watched and _end(done, stage) == _end(new, stage):
            # Rule `marginal` looks at what is left of the budget, and at what the next size would do with it.
            if new.trigger.rule == "kappa" or (same_budget and _size(done, stage + 1) == _size(new, stage + 1)):
                continue
            return stage - 1, forever
        # `done` stays longer, or may. Whether a κ of `new` would have been met on the way is not known.
        return (stage, _end(new, stage)[1:]) if by_caps_alone(new) else (stage - 1, forever)
    raise AssertionError("a stage that is the last of either has ended the search")


def by_caps_alone(growth: GrowthConfig) -> bool:
    """Whether it is κ that grows, and waits for a loss of 0, which no run has."""
    trigger = growth.trigger
    losses = trigger.constant if isinstance(trigger.constant, list) else [trigger.constant or 0.0]
    kappas = [trigger.kappa, *(stage.kappa for stage in growth.stages if stage.kappa is not None)]
    return trigger.rule == "kappa" and trigger.predictor == "constant" and max(losses) <= 0 and min(kappas) == 1


def _size(growth: GrowthConfig, stage: int) -> dict[str, Any]:
    return _but(growth.stages[stage - 1], "kappa", "max_tokens", "max_flops")


def _end(growth: GrowthConfig, stage: int) -> tuple[float | None, int | None, float | None]:
    """What ends a stage: κ, and caps in tokens and FLOPs of its own."""
    if stage == 0:
        return growth.trigger.kappa, growth.max_tokens, growth.max_flops
    section = growth.stages[stage - 1]
    return section.kappa, section.max_tokens, section.max_flops


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
