"""Growths that the fall of the learning rate has overtaken: what the configuration alone says of them."""

from __future__ import annotations

from math import ceil

from megabus.config import RunConfig, Stage
from megabus.config.stages import stage_section
from megabus.errors import UserError
from megabus.model.budget import Spent, cap_tokens
from megabus.train.schedule import decays, spent_share

ROUNDING = 1e-9  # of shares: a cap at the very beginning of the fall is none in it


def _share(spent: Spent, config: RunConfig) -> float:
    return spent_share(config.train, spent.steps, spent.tokens, spent.flops)


def check_growths(config: RunConfig, stages: list[Stage]) -> list[str]:
    """A line for each growth that comes while wsd's rate falls, if no κ brings it earlier than its caps do: nothing
    forbids that, and few mean it. And one where the caps leave something of the budget to the next stage, and whole
    steps do not.

    Raises `UserError` about a stage that nothing ends: it has no cap, and wsd's rate, in whose fall κ decides nothing,
    falls before κ has the evaluations that it needs.
    """
    told: list[str] = []
    soonest = Spent()
    latest: Spent | None = Spent()
    whole = Spent()
    for stage in stages[:-1]:  # the last one ends with the run
        capped, by_kappa = cap_tokens(stage), _first_decision(config, stage, soonest)
        at, silent = _share(by_kappa, config), decays(config.optimizer, _share(by_kappa, config))
        if capped is None:
            if at < 1 and silent:
                needed, begins = config.growth.trigger.min_evals, _begins(config)
                problem = f"nothing ends this stage: rule {config.growth.trigger.rule} has {needed} evaluations at "
                problem += f"{at:.0%} of the budget, and decides nothing while the rate falls, from {begins:.0%} on"
                raise UserError(*_key(stage), problem, "give it a cap, or lower optimizer.decay_share or eval.every")
            soonest, latest = by_kappa, None
            continue
        by_cap = soonest.after(stage, capped)
        soonest = by_cap if silent else min(by_kappa, by_cap, key=lambda spent: spent.tokens)
        if latest is None:  # a stage before may last for ever
            continue
        latest = latest.after(stage, capped)
        before, whole = whole, whole.after(stage, ceil(capped / stage.tokens_per_step) * stage.tokens_per_step)
        at = _share(latest, config)
        if at < 1 <= _share(whole, config) and _share(before, config) < 1:
            problem = f"leaves stage {stage.index + 1} something of the budget, and the whole steps of "
            problem += f"{stage.tokens_per_step} tokens that stages take leave it nothing"
            told.append(str(UserError(*_key(stage), problem, "raise the budget, or grow less often")))
        if at < 1 and decays(config.optimizer, at - ROUNDING):
            problem = f"ends this stage at {at:.0%} of the budget, and the rate falls from {_begins(config):.0%} on"
            told.append(
                str(UserError(*_key(stage), problem, "lower it, or optimizer.decay_share, if that is not meant"))
            )
    return told


def _begins(config: RunConfig) -> float:
    return 1 - config.optimizer.decay_share


def _first_decision(config: RunConfig, stage: Stage, begun: Spent) -> Spent:
    """When κ can end a stage at the earliest: one evaluation comes with it, the others at multiples of eval.every."""
    steps = max(0, config.growth.trigger.min_evals - 2) * config.eval.every
    return begun.after(stage, steps * stage.tokens_per_step)


def _key(stage: Stage) -> tuple[str, object]:
    """The cap by which the stage ends first, as it stands in the file, and its value."""
    section = stage_section(stage.index, "growth")
    if stage.max_flops is not None and (stage.max_tokens is None or cap_tokens(stage) != stage.max_tokens):
        return f"{section}.max_flops", stage.max_flops
    return f"{section}.max_tokens", "(missing)" if stage.max_tokens is None else stage.max_tokens
