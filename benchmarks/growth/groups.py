"""Runs that belong together: an arm's seeds at its learning rate and one budget, and how such groups compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.growth.experiment import Experiment, best_rate, make_job
from benchmarks.growth.results import Result, Results
from benchmarks.growth.savings import Bound, Saving, Spread, overall, saving, spread
from megabus.train.schedule import learning_rate

END = 0.1  # of the highest rate, where a run ends


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
        for budget in sorted(spec.budgets):
            lr = best_rate(experiment, arm, budget, results.loss_of)
            if lr is None:
                continue
            wanted = [make_job(experiment, arm, seed, lr, budget) for seed in spec.seeds or experiment.seeds]
            runs = [result for job in wanted if (result := results.get(job)) is not None]
            if runs:
                found.append(Group(arm, budget, lr, runs))
    return found


def difference(experiment: Experiment, found: Sequence[Group], group: Group) -> Spread | None:
    """By how much a group's final losses lie below those of `versus`, over the seeds that both have."""
    other = next((g for g in found if g.arm == experiment.versus and g.budget == group.budget), None)
    if other is None or other is group:
        return None
    losses = {run.seed: run.loss for run in other.finite}
    gains = [losses[run.seed] - run.loss for run in group.finite if run.seed in losses]
    return spread(gains) if gains else None


def decayed(experiment: Experiment, group: Group) -> bool:
    """Whether the rate has come down to a tenth at most where a run ends. A loss at a higher rate lies above what a
    decay makes of it, by more for one way of training than for another: such losses are not compared."""
    job = make_job(experiment, group.arm, experiment.seeds[0], group.lr, group.budget)
    return learning_rate(job.asked.optimizer, 1.0, 1.0) <= END


def each_saving(experiment: Experiment, found: Sequence[Group], group: Group) -> dict[int, Saving]:
    """S by seed, of seeds that the reference has runs of. Empty for the reference itself, and where a run's end is not
    decayed."""
    others = [g for g in found if g.arm == experiment.reference and decayed(experiment, g)]
    if group.arm == experiment.reference or not decayed(experiment, group):
        return {}
    savings = {}
    for run in group.finite:
        reference = [(r.flops, r.loss) for g in others for r in g.finite if r.seed == run.seed]
        if (one := saving(run.loss, run.flops, reference)) is not None:
            savings[run.seed] = one
    return savings


def savings_of(experiment: Experiment, found: Sequence[Group], group: Group) -> tuple[Spread, Bound] | None:
    """S over seeds; None without any."""
    savings = each_saving(experiment, found, group)
    return overall([*savings.values()]) if savings else None
