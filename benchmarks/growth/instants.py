"""When would each κ have grown? The monitor again, over validation curves that runs have left behind.

No run is made: a stage that its cap ended has a curve up to there, and the monitor decides at each point of it as it
does in a run. Beside what predictors say, `hindsight` knows the loss that the stage came to: at its instants the share
κ had come of what the stage was to give. Curves are looked at up to the fall of the learning rate, where κ acts no
more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.growth.experiment import Experiment, make_job
from benchmarks.growth.groups import Group
from benchmarks.growth.results import Point, Result
from megabus.config import RunConfig, Stage, resolve_stages
from megabus.config.schema import KappaConfig
from megabus.kappa.monitor import KappaMonitor
from megabus.model.cost import count_parameters
from megabus.train.run import kappa_settings

KAPPAS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Watched:
    """A stage of a run as the monitor saw it. points: its validations at a constant rate, the first at its beginning;
    spent: FLOPs that it took in all."""

    stage: Stage
    points: list[Point]
    spent: float


def watched_stages(run: Result, stages: Sequence[Stage], decay: float) -> Iterator[Watched]:
    """Of a finished run. decay: the share of the run's FLOPs from which on the learning rate falls."""
    left = list(run.curve)
    for number, stage in enumerate(stages[: len(run.growths) + 1]):
        end = run.growths[number]["flops"] if number < len(run.growths) else run.flops
        own = [point for point in left if point.flops < end]
        # A growth validates twice at its instant: this stage's last loss and the next one's first.
        own += [point for point in left[len(own) :] if point.flops == end][:1]
        left = left[len(own) :]
        points = [point for point in own if point.flops <= decay * run.flops]
        if len(points) > 1:
            yield Watched(stage, points, own[-1].flops - own[0].flops)


def instant(watched: Watched, trigger: KappaConfig) -> float | None:
    """The share of the stage's FLOPs after which κ grows; None where it does not before the cap or the decay."""
    stage, first = watched.stage, watched.points[0]
    monitor = KappaMonitor(kappa_settings(trigger))
    monitor.start_stage(
        stage.index,
        count_parameters(stage.model),
        trigger.kappa,
        stage.max_tokens,
        stage.max_flops,
        tokens=first.tokens,
        flops=first.flops,
    )
    for point in watched.points:
        if monitor.observe(point.tokens, point.flops, point.loss).reason == "kappa":
            return (point.flops - first.flops) / watched.spent
    return None


def instants_table(experiment: Experiment, found: Sequence[Group]) -> str:
    """A line for each stage of each group's first run, and predictor. All are judged by the trigger of `versus`."""
    lines = [
        f"| arm | seed | size | validations | predictor | {' | '.join(f'κ {kappa:g}' for kappa in KAPPAS)} |",
        f"|---|---|---|---|---|{'---|' * len(KAPPAS)}",
    ]
    trigger = _config(experiment, experiment.versus, experiment.seeds[0], 1e-3, 1.0).growth.trigger
    for group in found:
        for run in group.finite[:1]:
            config = _config(experiment, group.arm, run.seed, group.lr, group.budget)
            begins = 1 - config.optimizer.decay_share if config.optimizer.schedule == "wsd" else 1.0
            for watched in watched_stages(run, resolve_stages(config, world_size=1), begins):
                if len(watched.points) >= trigger.min_evals:  # with fewer no κ grows
                    lines += _lines(group, run, watched, trigger)
    return "\n".join(lines)


def _config(experiment: Experiment, arm: str, seed: int, lr: float, budget: float) -> RunConfig:
    return make_job(experiment, arm, seed, lr, budget).config(Path("unused"))


def _lines(group: Group, run: Result, watched: Watched, trigger: KappaConfig) -> Iterator[str]:
    known = {"constant": watched.points[-1].loss}
    for name, predictor in (("fit", "fit"), ("scaling_law", "scaling_law"), ("hindsight", "constant")):
        how = known | {"predictor": predictor}
        at = [instant(watched, trigger.model_copy(update={**how, "kappa": kappa})) for kappa in KAPPAS]
        cells = [group.arm, str(run.seed), f"d{watched.stage.model.d_model}", str(len(watched.points)), name]
        yield f"| {' | '.join(cells + ['–' if share is None else f'{share:.0%}' for share in at])} |"
