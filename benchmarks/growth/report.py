"""What an experiment's results say: tables in markdown, and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.growth.experiment import Experiment, best_rate, make_job, tuning_jobs
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


def report(experiment: Experiment, results: Results, out: Path | None) -> str:
    """The tables; with `out` they and the pictures are written there, named after the experiment."""
    from benchmarks.growth.predicted import law_table

    found = groups(experiment, results)
    parts = [
        "## Learning rates", tuning_table(experiment, results),
        "## Arms", arms_table(experiment, found),
        "## Growths", growth_table(experiment, found),
        "## Against a law", law_table(experiment, found),
    ]  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    if out is not None:
        from benchmarks.growth.pictures import draw_arms, draw_curves

        out.mkdir(parents=True, exist_ok=True)
        (out / f"{experiment.name}.md").write_text(f"# {experiment.name}\n\n{text}", encoding="utf-8")
        draw_curves(experiment, found, out / f"{experiment.name}-curves.png")
        draw_arms(experiment, found, out / f"{experiment.name}-arms.png")
    return text


def tuning_table(experiment: Experiment, results: Results) -> str:
    """Every rate that was tried. One at the end of its list may not be the best there is, and is marked."""
    lines = ["| arm | budget | losses by learning rate | chosen |", "|---|---|---|---|"]
    for arm in experiment.arms:
        if experiment.arms[arm].lr.tune is None:
            continue
        tried = [(job.lr, results.loss_of(job)) for job in tuning_jobs(experiment, arm)]
        losses = ", ".join(f"{lr:g}: {_loss(loss)}" for lr, loss in tried)
        best = best_rate(experiment, arm, results.loss_of)
        edge = best is not None and len(tried) > 1 and best in (min(tried)[0], max(tried)[0])
        chosen = "–" if best is None else f"{best:g}" + (" (at the end of the list!)" if edge else "")
        lines.append(f"| {arm} | {experiment.tune_budget:g} | {losses} | {chosen} |")
    return "\n".join(lines)


def arms_table(experiment: Experiment, found: Sequence[Group]) -> str:
    """A line for each arm and budget: its final loss, how it differs from `versus` seed by seed, and S."""
    lines = [
        f"| arm | | budget | parameters | seeds | loss | less than {experiment.versus} by | S | tokens | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in found:
        runs = group.finite
        failures = len(group.runs) - len(runs)
        if not runs:
            lines.append(f"| {group.arm} | | {group.budget:g} | – | {failures} failed | – | – | – | – | – |")
            continue
        cells = [
            group.arm,
            experiment.arms[group.arm].about,
            f"{group.budget:g}",
            f"{runs[0].n_params / 1e6:.2f}M",
            f"{len(runs)}" + (f", {failures} failed" if failures else ""),
            _mean(spread([run.loss for run in runs])),
            _difference(difference(experiment, found, group)),
            _saving(savings_of(experiment, found, group)),
            f"{statistics.fmean(run.tokens for run in runs) / 1e6:.2f}M",
            f"{60 * statistics.fmean(run.hours for run in runs):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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


def growth_table(experiment: Experiment, found: Sequence[Group]) -> str:
    """When each arm grew, as a share of its run's FLOPs, why, and what the growth did to the loss at that instant."""
    lines = ["| arm | budget | growth | at share of FLOPs | tokens before | why | loss just before and after |"]
    lines.append("|---|---|---|---|---|---|---|")
    for group in found:
        for number in range(max((len(run.growths) for run in group.finite), default=0)):
            runs = [(run, run.growths[number]) for run in group.finite if len(run.growths) > number]
            shares = [g["flops"] / run.flops for run, g in runs]
            sizes = f"d {runs[0][1]['old']['d_model']} → {runs[0][1]['new']['d_model']}"
            tokens = statistics.fmean(g["tokens"] for _, g in runs)
            why = ", ".join(sorted({"κ" if g["reason"] == "kappa" else g["reason"] for _, g in runs}))
            pairs = [(g["loss_before"], g["loss_after"]) for _, g in runs]
            sound = [(before, after) for before, after in pairs if before is not None and after is not None]
            jump = "–"
            if sound:
                jump = f"{statistics.fmean(b for b, _ in sound):.4f} {statistics.fmean(a - b for b, a in sound):+.1e}"
            share = f"{min(shares):.0%}" + (f" to {max(shares):.0%}" if max(shares) - min(shares) > 0.005 else "")
            cells = [group.arm, f"{group.budget:g}", sizes, share, f"{tokens / 1e6:.2f}M", why]
            lines.append(f"| {' | '.join(cells)} | {jump} |")
    return "\n".join(lines)


def _loss(loss: float | None) -> str:
    return "to do" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "failed"


def _mean(value: Spread) -> str:
    return f"{value.mean:.4f}" + ("" if value.std is None else f" ± {value.std:.4f}")


def _difference(value: Spread | None) -> str:
    if value is None:
        return "–"
    interval = "" if value.interval is None else f" ({value.interval[0]:+.4f} to {value.interval[1]:+.4f})"
    return f"{value.mean:+.4f}{interval}"


def _saving(found: tuple[Spread, Bound] | None) -> str:
    if found is None:
        return "–"
    value, bound = found
    interval = "" if value.interval is None else f" ({value.interval[0]:.2f} to {value.interval[1]:.2f})"
    return f"{bound}{value.mean:.2f}{interval}"
