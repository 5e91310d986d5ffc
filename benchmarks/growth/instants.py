"""When would each κ have grown? The monitor again, over validation curves that runs have left behind.

No run is made: the monitor decides at each validation of a stage as it does in a run. Looked at are stages that no κ
has ended, each as if it had a cap at its end, or where the learning rate begins to fall if that comes first: κ acts no
more there. Beside what predictors say, `hindsight` knows the loss that a stage came to with that cap: at its instants
the share κ had come of what the stage was to give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.growth.experiment import Experiment, make_job
from benchmarks.growth.groups import Group
from benchmarks.growth.results import Point, Result, points_of_stages
from megabus.config import RunConfig, Stage, resolve_stages
from megabus.config.schema import KappaConfig
from megabus.errors import UserError
from megabus.kappa.monitor import KappaMonitor
from megabus.model.budget import spent_share
from megabus.train.run import span_of
from megabus.train.schedule import decays

KAPPAS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


def instant(stage: Stage, points: Sequence[Point], trigger: KappaConfig) -> float | None:
    """FLOPs of the run at which κ grows out of a stage; None where it does not at any of the points."""
    monitor = KappaMonitor(trigger)
    monitor.start_stage(span_of(replace(stage, kappa=trigger.kappa), points[0].tokens, points[0].flops))
    for point in points:
        if monitor.observe(point.tokens, point.flops, point.loss).reason == "kappa":
            return point.flops
    return None


def instants_table(experiment: Experiment, found: Sequence[Group]) -> str:
    """A line for each predictor and stage of each group's first run."""
    lines = [
        f"| arm | seed | size | validations | predictor | {' | '.join(f'κ {kappa:g}' for kappa in KAPPAS)} |",
        f"|---|---|---|---|---|{'---|' * len(KAPPAS)}",
    ]
    triggers = predictors_of(experiment)
    min_evals = min(trigger.min_evals for trigger in triggers.values())
    for group in found:
        for run in group.finite[:1]:
            config = _config(experiment, group.arm, run.seed, group.lr, group.budget)
            stages = resolve_stages(config, world_size=1)
            for number, points in enumerate(points_of_stages(run)):
                by_kappa = number < len(run.growths) and run.growths[number]["reason"] == "kappa"
                steady = [point for point in points if not falling(config, point)]
                if not by_kappa and len(steady) >= min_evals:  # with fewer no κ grows
                    lines += _lines(group, run, stages[number], steady, triggers)
    if len(lines) == 2:
        return f"No stage that a cap or the run ended has {min_evals} validations at a constant rate."
    return "\n".join(lines)


def predictors_of(experiment: Experiment) -> dict[str, KappaConfig]:
    """The triggers to judge by: `fit` and `scaling_law` as the arm `versus` has them, hindsight in its manner, and
    what other arms bring of their own, named after them. (A `constant` is somebody's hindsight.)"""
    triggers = {arm: _config(experiment, arm, experiment.seeds[0], 1e-3, 1.0).growth.trigger for arm in experiment.arms}
    versus = triggers.pop(experiment.versus)
    if versus.rule != "kappa":
        key, problem = f"arms.{experiment.versus}: growth.trigger.rule", "asks no κ, and instants are of κ"
        raise UserError(key, versus.rule, problem, "let `versus` name an arm that grows by kappa")
    known = {name: versus.model_copy(update={"predictor": name}) for name in ("fit", "scaling_law")}
    seen = [_brings(trigger) for trigger in known.values()]
    for arm, trigger in triggers.items():
        if trigger.predictor != "constant" and _brings(trigger) not in seen:
            seen.append(_brings(trigger))
            known[f"{trigger.predictor} of {arm}"] = trigger
    return known | {"hindsight": versus.model_copy(update={"predictor": "constant"})}


def _brings(trigger: KappaConfig) -> tuple[str, object]:
    """A predictor and what it is given."""
    return trigger.predictor, getattr(trigger, trigger.predictor, None)


def falling(config: RunConfig, point: Point) -> bool:
    """Whether the learning rate falls there. Budgets of experiments are FLOPs, so steps need not be known."""
    return decays(config.optimizer, spent_share(config.train, 0, point.tokens, point.flops))


def _config(experiment: Experiment, arm: str, seed: int, lr: float, budget: float) -> RunConfig:
    return make_job(experiment, arm, seed, lr, budget).config(Path("unused"))


def _lines(
    group: Group, run: Result, stage: Stage, points: Sequence[Point], triggers: Mapping[str, KappaConfig]
) -> Iterator[str]:
    spent = points[-1].flops - points[0].flops
    capped = replace(stage, max_tokens=None, max_flops=spent)
    for name, trigger in triggers.items():
        if trigger.predictor == "constant":
            trigger = trigger.model_copy(update={"constant": points[-1].loss})
        at = [instant(capped, points, trigger.model_copy(update={"kappa": kappa})) for kappa in KAPPAS]
        shares = ["–" if flops is None else f"{(flops - points[0].flops) / spent:.0%}" for flops in at]
        cells = [group.arm, str(run.seed), f"d{stage.model.d_model}", str(len(points)), name]
        yield f"| {' | '.join(cells + shares)} |"
