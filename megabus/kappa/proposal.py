"""A growth plan for a run's stages: made from its configuration, and written as a table and as sections to paste.

What is proposed is what measured best (docs/growth_results.md), `growth: auto`: depth in doublings. By the law of
losses sizes can be searched as well, in width and depth together; it knows nothing of the manner of growing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from megabus.config import RunConfig, Stage
from megabus.config.auto import depths, written_out
from megabus.config.load import parse_config
from megabus.config.pair import sizes_of
from megabus.config.schema import ScalingLaw, TrainConfig
from megabus.errors import UserError
from megabus.kappa.planner import GrowthPlan, Size, plan_growth, spend
from megabus.model.budget import Spent, mean_length
from megabus.model.cost import count_parameters, flops_per_token

BUDGETS = ("max_flops", "max_tokens", "max_steps")


def sizes_under(law: ScalingLaw, train: TrainConfig, stages: Sequence[Stage]) -> list[Size]:
    """The stages' models. Where phases of train change lengths, a token costs each what it does on average over the
    budget."""
    return [Size(stage.model, mean_length(train, stage), law) for stage in stages]


def searched(
    train: TrainConfig, last: Stage, tokens: float, law: ScalingLaw, max_stages: int, *, reach_final: bool
) -> GrowthPlan:
    """By the law alone: the cheapest sizes up to the last stage's, and when each becomes the next."""
    tp, pp = last.layout.tp, last.layout.pp
    return plan_growth(last.model, mean_length(train, last), tokens, law, max_stages, tp, pp, reach_final=reach_final)


def doubled(config: RunConfig, last: Stage, tokens: float) -> tuple[RunConfig, dict[str, Any]]:
    """`growth: auto` for the last stage's size, with the FLOPs that it takes from scratch with `tokens`: the whole
    configuration, and its sections that say so.

    Raises UserError where there is no depth to double.
    """
    if len(depths(last.model.n_layers, last.layout.pp)) == 1:
        problem = f"leaves nothing to double, with layout.pp = {last.layout.pp}"
        raise UserError(
            "model.n_layers", last.model.n_layers, problem, "add --by-law for smaller widths, or more layers"
        )
    flops = tokens * flops_per_token(last.model, mean_length(config.train, last))
    tree = config.model_dump(exclude_unset=True)
    layout = {"tp": last.layout.tp, "pp": last.layout.pp, "dp": last.layout.dp}
    tree |= {"model": last.model.model_dump(exclude_unset=True), "layout": layout, "growth": {}}
    tree["train"] |= dict.fromkeys(BUDGETS) | {"max_flops": float(f"{flops:.4g}")}
    sections = written_out(parse_config(tree))
    return parse_config(tree | sections), sections | {"train": {key: tree["train"][key] for key in BUDGETS}}


def ends_by_caps(stages: Sequence[Stage]) -> bool:
    """Whether each stage but the last has a cap."""
    return all(stage.max_tokens or stage.max_flops for stage in stages[:-1])


def capped(train: TrainConfig, stages: Sequence[Stage], law: ScalingLaw) -> GrowthPlan:
    """The run that the file asks for, if caps alone end its stages; each but the last has one."""
    spent: list[float] = []
    now = Spent()
    for stage in stages:
        caps = (math.inf, math.inf)
        if stage is not stages[-1]:
            caps = (stage.max_tokens or math.inf, stage.max_flops or math.inf)
        then = now.after(train, stage, *caps, share=1.0)
        if then.flops - now.flops <= 1e-9 * sum(spent):  # no crumbs of rounding
            then = now
        spent.append(then.flops - now.flops)
        now = then
    return spend(sizes_under(law, train, stages), spent)


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


def sections(plan: GrowthPlan) -> dict[str, Any]:
    """The sections of a configuration that follow the plan; every stage's tokens as its cap."""
    models = [stage.model for stage in plan.stages]
    caps = [max(1, int(stage.tokens)) for stage in plan.stages]
    final = models[-1]
    first, *grown = [sizes_of(model) for model in models]
    for sizes, cap in zip(grown[:-1], caps[1:], strict=False):  # the last stage ends with the run
        sizes["max_tokens"] = cap
    tree: dict[str, Any] = {"model": final.model_dump(exclude_unset=True) | first}
    tree["train"] = dict.fromkeys(BUDGETS) | {"max_flops": float(f"{plan.flops:.4g}")}
    return tree | ({"growth": {"max_tokens": caps[0], "stages": grown}} if grown else {})
