"""What a law of losses, fitted to the experiment's own runs of fixed sizes, would have planned, and what happened."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from benchmarks.growth.experiment import Experiment, make_job
from benchmarks.growth.groups import Group
from megabus.config import Stage, resolve_stages
from megabus.errors import UserError
from megabus.kappa.laws import fit_law
from megabus.kappa.planner import Size, plan_stages


def stages_of(experiment: Experiment, group: Group) -> list[Stage]:
    job = make_job(experiment, group.arm, experiment.seeds[0], group.lr, group.budget)
    return resolve_stages(job.config(Path("unused")), world_size=1)


def law_table(experiment: Experiment, found: Sequence[Group]) -> str:
    """The law fitted to the arms that are marked for it, and for every arm that grows the plan of its sizes to the loss
    that it ended with: of seeds that all law arms have, at each of their budgets."""
    marked = [g for g in found if g.finite and experiment.arms[g.arm].ladder]
    arms = ", ".join(dict.fromkeys(g.arm for g in marked))
    # other seeds, of some sizes and budgets only, are other data
    common = set.intersection(*({run.seed for run in g.finite} for g in marked)) if marked else set()
    if marked and not common:
        return f"No law yet: no seed has every marked arm ({arms}) at each of its budgets."
    narrowed = [replace(g, runs=[run for run in g.finite if run.seed in common]) for g in found]
    fixed = [g for g in narrowed if g.runs and experiment.arms[g.arm].ladder]
    points = [(run.n_params, run.tokens, run.loss) for g in fixed for run in g.runs]
    try:
        fitted = fit_law([(float(n), float(d), loss) for n, d, loss in points])
    except UserError as error:
        return f"No law yet: {error.value} {error.problem}."
    law = fitted.law
    form = f"{law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}"
    lines = [
        f"L(N, D) = {form}, from {fitted.n_points} runs of fixed sizes ({arms}), {fitted.rms:.4f} nats rms.",
        "",
        "| arm | budget | loss | FLOPs by the law | FLOPs taken | tokens of each size by the law | taken |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in narrowed:
        if not any(run.growths for run in group.finite):
            continue
        stages = stages_of(experiment, group)
        loss = statistics.fmean(run.loss for run in group.finite)
        try:
            sizes = [Size(stage.model, stage.seq_len, law) for stage in stages]
            plan = plan_stages(sizes, loss, reach_final=False)
        except ValueError as error:
            lines.append(f"| {group.arm} | {group.budget:g} | {loss:.4f} | {error} | | | |")
            continue
        planned = {stage.model: stage.tokens for stage in plan.stages}
        by_law = ", ".join(f"{planned.get(stage.model, 0.0) / 1e6:.2f}M" for stage in stages)
        cells = [group.arm, f"{group.budget:g}", f"{loss:.4f}", f"{plan.flops:.2e}"]
        cells += [f"{statistics.fmean(run.flops for run in group.finite):.2e}", by_law, _taken(group, len(stages))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _taken(group: Group, n_stages: int) -> str:
    """Mean tokens of every size."""
    rows = []
    for run in group.finite:
        marks = [0, *(growth["tokens"] for growth in run.growths), run.tokens]
        rows.append([b - a for a, b in pairwise(marks)] + [0] * (n_stages - len(marks) + 1))
    return ", ".join(f"{statistics.fmean(column) / 1e6:.2f}M" for column in zip(*rows, strict=True))
