"""Growths that the fall of the learning rate has overtaken: what the configuration alone says of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megabus.config import RunConfig, Stage
from megabus.config.stages import stage_section
from megabus.errors import UserError
from megabus.model.cost import flops_per_token
from megabus.train.schedule import decays, spent_share

ROUNDING = 1e-9  # of shares: a cap at the very beginning of the fall is none in it


@dataclass(frozen=True)
class _Spent:
    """Steps, tokens and FLOPs since the run began."""

    steps: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0

    def after(self, stage: Stage, tokens: float) -> _Spent:
        """With so many tokens of a stage added."""
        cost = flops_per_token(stage.model, stage.seq_len)
        steps = tokens / stage.tokens_per_step
        return _Spent(self.steps + steps, self.tokens + tokens, self.flops + tokens * cost)

    def share(self, config: RunConfig) -> float:
        return spent_share(config.train, self.steps, self.tokens, self.flops)


def check_growths(config: RunConfig, stages: list[Stage]) -> list[str]:
    """A line for each growth that comes while wsd's rate falls, if no κ brings it earlier than its caps do: nothing
    forbids that, and few mean it. And one where the caps leave something of the budget to the next stage, and whole
    steps do not.

    Raises `UserError` about a stage that nothing ends: it has no cap, and wsd's rate, in whose fall κ decides nothing,
    falls before κ has the evaluations that it needs.
    """
    told: list[str] = []
    soonest = _Spent()
    latest: _Spent | None = _Spent()
    whole = _Spent()
    for stage in stages[:-1]:  # the last one ends with the run
        capped, by_kappa = _cap_tokens(stage), _first_decision(config, stage, soonest)
        at, silent = by_kappa.share(config), decays(config.optimizer, by_kappa.share(config))
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
        at = latest.share(config)
        if at < 1 <= whole.share(config) and before.share(config) < 1:
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


def _first_decision(config: RunConfig, stage: Stage, begun: _Spent) -> _Spent:
    """When κ can end a stage at the earliest: one evaluation comes with it, the others at multiples of eval.every."""
    steps = max(0, config.growth.trigger.min_evals - 2) * config.eval.every
    return begun.after(stage, steps * stage.tokens_per_step)


def _cap_tokens(stage: Stage) -> float | None:
    """Tokens after which the first of the stage's caps is reached; None where it has none."""
    cost = flops_per_token(stage.model, stage.seq_len)
    caps = [stage.max_tokens, None if stage.max_flops is None else stage.max_flops / cost]
    return min((cap for cap in caps if cap is not None), default=None)


def _key(stage: Stage) -> tuple[str, object]:
    """The cap by which the stage ends first, as it stands in the file, and its value."""
    section = stage_section(stage.index, "growth")
    if stage.max_flops is not None and (stage.max_tokens is None or _cap_tokens(stage) != stage.max_tokens):
        return f"{section}.max_flops", stage.max_flops
    return f"{section}.max_tokens", "(missing)" if stage.max_tokens is None else stage.max_tokens
