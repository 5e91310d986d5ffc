"""How the learning rate follows the number of steps that a run takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, inf

from megabus.config import RunConfig, Stage
from megabus.config.schema import TrainConfig
from megabus.model.budget import Spent, spent_share
from megabus.model.cost import flops_per_token

EXPONENT = -1 / 3  # of steps, in nu-GPT (Shigida et al. 2026, arXiv 2604.27077)


def at_horizon(config: RunConfig, stages: Sequence[Stage]) -> list[Stage]:
    """The stages with their learning rates times (planned steps / optimizer.transfer.steps)^(-1/3), one factor for all
    of the run; as they are where no such number is given."""
    factor = horizon_factor(config, stages)
    if factor is None:
        return list(stages)
    return [replace(stage, lr=stage.lr * factor) for stage in stages]


def horizon_factor(config: RunConfig, stages: Sequence[Stage]) -> float | None:
    """What the learning rates are multiplied by for the number of steps; None where `optimizer.transfer` has none."""
    tuned = config.optimizer.transfer
    if tuned is None or tuned.steps is None:
        return None
    return float((planned_steps(config.train, stages) / tuned.steps) ** EXPONENT)


def planned_steps(train: TrainConfig, stages: Sequence[Stage]) -> int:
    """Optimizer steps of the whole run, by its configuration alone.

    A stage with a cap ends there, as if kappa came no earlier. One without, which kappa alone ends, is taken to spend
    its part of what is left of the budget: one half where one stage comes after it, a third where two do.
    """
    total, tokens, flops, last = 0, 0, 0.0, len(stages) - 1
    for stage in stages:
        begun, uncapped = (tokens, flops), None
        for part, end in stage.onward(spent_share(train, total, tokens, flops)):
            cost = part.tokens_per_step * flops_per_token(part.model, part.seq_len)
            left = (
                train.max_steps - total if train.max_steps else inf,
                (train.max_tokens - tokens) / part.tokens_per_step if train.max_tokens else inf,
                (train.max_flops - flops) / cost if train.max_flops else inf,
            )
            steps = max(0, ceil(min(left)))
            if stage.index < last:
                caps = (
                    (stage.max_tokens - (tokens - begun[0])) / part.tokens_per_step if stage.max_tokens else inf,
                    (stage.max_flops - (flops - begun[1])) / cost if stage.max_flops else inf,
                )
                if uncapped is None:
                    uncapped = ceil(steps / (last + 1 - stage.index))
                own = max(0, ceil(min(caps))) if min(caps) < inf else uncapped
                steps = min(steps, own)
            taken = steps
            if end < inf:
                lasts = Spent(total, tokens, flops).tokens_to(train, part, end)
                taken = min(steps, ceil(lasts / part.tokens_per_step))
            total, tokens, flops = total + taken, tokens + taken * part.tokens_per_step, flops + taken * cost
            if taken == steps:
                break
            uncapped = None if uncapped is None else uncapped - taken
    return total
