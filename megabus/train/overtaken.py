"""Growths that the fall of the learning rate has overtaken: what the configuration alone says of them."""

from __future__ import annotations

from math import ceil, inf

from megabus.config import RunConfig, Stage
from megabus.config.stages import stage_section
from megabus.errors import UserError
from megabus.model.budget import Spent
from megabus.model.cost import flops_per_token
from megabus.train.schedule import decays

ROUNDING = 1e-9  # of shares: a cap at the very beginning of the fall is none in it


def check_growths(config: RunConfig, stages: list[Stage]) -> list[str]:
    """A line for each growth that comes while wsd's rate falls, if no κ brings it earlier than its caps do: nothing
    forbids that, and few mean it. And one where the caps leave something of the budget to the next stage, and whole
    steps do not.

    Raises `UserError` about a stage that nothing ends: it has no cap, and wsd's rate, in whose fall κ decides nothing,
    falls before κ has the evaluations that it needs.
    """
    messages: list[str] = []
    train, soonest = config.train, Spent()
    latest: Spent | None = Spent()
    whole = Spent()
    for stage in stages[:-1]:  # the last one ends with the run
        by_kappa = _first_decision(config, stage, soonest)
        at = by_kappa.share(train)
        silent = decays(config.optimizer, at)
        if stage.max_tokens is None and stage.max_flops is None:
            if at < 1 and silent:
                needed, begins = config.growth.trigger.min_evals, _begins(config)
                problem = f"nothing ends this stage: rule {config.growth.trigger.rule} has {needed} evaluations at "
                problem += f"{at:.0%} of the budget, and decides nothing while the rate falls, from {begins:.0%} on"
                raise UserError(*_key(stage), problem, "give it a cap, or lower optimizer.decay_share or eval.every")
            soonest, latest = by_kappa, None
            continue
        by_cap = soonest.after(train, stage, *_caps(stage))
        soonest = by_cap if silent else min(by_kappa, by_cap, key=lambda spent: spent.tokens)
        if latest is None:  # a stage before may last for ever
            continue
        latest = latest.after(train, stage, *_caps(stage))
        before, ended = whole, whole.after(train, stage, *_caps(stage))
        step = stage.at(ended.share(train)).tokens_per_step
        whole = before.after(train, stage, tokens=ceil((ended.tokens - before.tokens) / step) * step)
        at = latest.share(train)
        if at < 1 <= whole.share(train) and before.share(train) < 1:
            problem = f"leaves stage {stage.index + 1} something of the budget, and the whole steps of "
            problem += f"{step} tokens that stages take leave it nothing"
            messages.append(str(UserError(*_key(stage), problem, "raise the budget, or grow less often")))
        if at < 1 and decays(config.optimizer, at - ROUNDING):
            problem = f"ends this stage at {at:.0%} of the budget, and the rate falls from {_begins(config):.0%} on"
            messages.append(
                str(UserError(*_key(stage), problem, "lower it, or optimizer.decay_share, if that is not meant"))
            )
    return messages


def _begins(config: RunConfig) -> float:
    return 1 - config.optimizer.decay_share


def _first_decision(config: RunConfig, stage: Stage, begun: Spent) -> Spent:
    """When κ can end a stage at the earliest: one evaluation comes with it, or with a new phase of its samples, the
    others at multiples of eval.every."""
    steps, now = max(0, config.growth.trigger.min_evals - 2) * config.eval.every, begun
    for part, end in stage.onward(begun.share(config.train)):
        lasts = now.tokens_to(config.train, part, end)
        now = now.plus(part, min(lasts, steps * part.tokens_per_step))
        if steps * part.tokens_per_step <= lasts:
            break
    return now


def _caps(stage: Stage) -> tuple[float, float]:
    """Tokens and FLOPs."""
    return stage.max_tokens or inf, stage.max_flops or inf


def _key(stage: Stage) -> tuple[str, object]:
    """The cap by which the stage ends first, as it stands in the file, and its value."""
    section = stage_section(stage.index, "growth")
    cost = flops_per_token(stage.model, stage.seq_len)
    if stage.max_flops is not None and (stage.max_tokens is None or stage.max_flops / cost < stage.max_tokens):
        return f"{section}.max_flops", stage.max_flops
    return f"{section}.max_tokens", "(missing)" if stage.max_tokens is None else stage.max_tokens
