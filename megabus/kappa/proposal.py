"""A growth plan for a run's stages: made from its configuration, and written as a table and as sections to paste."""

from __future__ import annotations

import math
from collections.abc import Sequence

import yaml

from megabus.config import RunConfig, Stage
from megabus.config.pair import sizes_of
from megabus.config.schema import ScalingLaw, TrainConfig
from megabus.errors import UserError
from megabus.kappa.planner import GrowthPlan, Size, plan_growth, plan_stages
from megabus.model.budget import Spent, mean_length
from megabus.model.cost import count_parameters


def plan_of(
    train: TrainConfig,
    stages: Sequence[Stage],
    tokens: float,
    law: ScalingLaw,
    max_stages: int,
    proposing: bool,
    *,
    reach_final: bool,
) -> GrowthPlan:
    """A proposal for the last stage's size, or the plan of all of the stages' sizes. Where phases of train change
    lengths, a token costs each size what it does on average over the budget."""
    last, lengths = stages[-1], [mean_length(train, stage) for stage in stages]
    if proposing:
        tp, pp = last.layout.tp, last.layout.pp
        return plan_growth(last.model, lengths[-1], tokens, law, max_stages, tp, pp, reach_final=reach_final)
    sizes = [Size(stage.model, length, law) for stage, length in zip(stages, lengths, strict=True)]
    return plan_stages(sizes, sizes[-1].loss(tokens), reach_final=reach_final)


def flops_by_caps(train: TrainConfig, stages: Sequence[Stage]) -> list[float] | None:
    """FLOPs of every stage of the run that the file asks for, if caps alone end its stages; None where one has none."""
    spent: list[float] = []
    now = Spent()
    for stage in stages:
        caps = (math.inf, math.inf)
        if stage is not stages[-1]:
            caps = (stage.max_tokens or math.inf, stage.max_flops or math.inf)
            if math.isinf(min(caps)):
                return None
        then = now.after(train, stage, *caps, share=1.0)
        if then.flops - now.flops <= 1e-9 * sum(spent):  # no crumbs of rounding
            then = now
        spent.append(then.flops - now.flops)
        now = then
    return spent


def tokens_of(config: RunConfig, last: Stage) -> float:
    """Tokens that the final size from scratch would get of the run's budget."""
    return Spent().after(config.train, last, share=1.0).tokens


def matching(
    plan: GrowthPlan, happened: Sequence[tuple[int, float, float | None]], run_dir: str
) -> dict[int, tuple[float, float | None]]:
    """What happened, by the parameters of the size."""
    found = {size: (tokens, loss) for size, tokens, loss in happened}
    planned = [count_parameters(stage.model) for stage in plan.stages]
    if not found.keys() & set(planned):
        ours, theirs = (", ".join(f"{n / 1e6:.2f}M" for n in sizes) for sizes in (planned, found))
        problem = f"has sizes of {theirs} parameters, and none of the plan's {ours}"
        raise UserError("--compare", run_dir, problem, "name the config.yaml of that run, and no --propose")
    return found


def table(plan: GrowthPlan, happened: dict[int, tuple[float, float | None]]) -> str:
    header = f"{'sizes':<28} {'params':>8} {'tokens':>9} {'FLOPs':>9} {'share':>6} {'loss at end':>11} {'way':>6}"
    lines = [header + (f"   {'tokens':>9} {'loss at end':>11}  (what happened)" if happened else "")]
    for stage in plan.stages:
        model = stage.model
        sizes = f"d{model.d_model} L{model.n_layers} H{model.n_heads} ff{model.d_ff}"
        n, way = count_parameters(model), "–" if stage.way is None else f"{stage.way:.2f}"
        line = f"{sizes:<28} {n / 1e6:>7.2f}M {stage.tokens:>9.2e} {stage.flops:>9.2e} {stage.flops / plan.flops:>6.0%}"
        line += f" {stage.end:>11.4f} {way:>6}"
        if n in happened:
            tokens, loss = happened[n]
            line += f"   {tokens:>9.2e} {'–' if loss is None else f'{loss:.4f}':>11}"
        lines.append(line)
    return "\n".join([*lines, "way: share of the way from a size's first loss to its floor, with endless tokens"])


def as_yaml(plan: GrowthPlan) -> str:
    """The sections of a configuration that follow the plan; every stage's tokens as its cap."""
    models = [stage.model for stage in plan.stages]
    caps = [max(1, int(stage.tokens)) for stage in plan.stages]
    final = models[-1]
    first, *grown = [sizes_of(model) for model in models]
    for sizes, cap in zip(grown[:-1], caps[1:], strict=False):  # the last stage ends with the run
        sizes["max_tokens"] = cap
    tree: dict[str, object] = {"model": final.model_dump(exclude_unset=True) | first}
    tree["train"] = {"max_flops": float(f"{plan.flops:.4g}"), "max_tokens": None, "max_steps": None}
    if grown:
        tree["growth"] = {"max_tokens": caps[0], "stages": grown}
    return yaml.safe_dump(tree, sort_keys=False)
