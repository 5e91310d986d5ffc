"""Runs that belong together: an arm's seeds at its learning rate and one budget, and how such groups compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.growth.experiment import Experiment, best_rate, make_job
from benchmarks.growth.results import Result, Results
from benchmarks.growth.savings import Bound, Saving, Spread, overall, saving, spread


@dataclass(frozen=True)
class Group:
    """An arm's runs of one budget at its learning rate, one a seed, in the order of seeds."""

    arm: str
    budget: float
    lr: float
    runs: list[Result]

    @property
    def finite(self) -> list[Result]:
        return [run for run in self.runs if math.isfinite(run.loss)]


def groups(experiment: Experiment, results: Results) -> list[Group]:
    """All that has results, by arm and budget in the experiment's order."""
    found = []
    for arm, spec in experiment.arms.items():
        lr = best_rate(experiment, arm, results.loss_of)
        for budget in sorted(spec.budgets) if lr is not None else ():
            wanted = [make_job(experiment, arm, seed, lr or 0.0, budget) for seed in spec.seeds or experiment.seeds]
            runs = [result for job in wanted if (result := results.get(job)) is not None]
            if runs:
                found.append(Group(arm, budget, lr or 0.0, runs))
    return found


def difference(experiment: Experiment, found: Sequence[Group], group: Group) -> Spread | None:
    """By how much a group's final losses lie below those of `versus`, over the seeds that both have."""
    other = next((g for g in found if g.arm == experiment.versus and g.budget == group.budget), None)
    if other is None or other is group:
        return None
    losses = {run.seed: run.loss for run in other.finite}
    gains = [losses[run.seed] - run.loss for run in group.finite if run.seed in losses]
    return spread(gains) if gains else None


def savings_of(experiment: Experiment, found: Sequence[Group], group: Group) -> tuple[Spread, Bound] | None:
    """S over the seeds that the reference has runs of; None for the reference itself and without any."""
    if group.arm == experiment.reference:
        return None
    savings: list[Saving] = []
    for run in group.finite:
        reference = [
            (r.flops, r.loss) for g in found if g.arm == experiment.reference for r in g.finite if r.seed == run.seed
        ]
        one = saving(run.loss, run.flops, reference)
        if one is not None:
            savings.append(one)
    return overall(savings) if savings else None
