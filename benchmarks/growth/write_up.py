"""What an experiment's results say: tables in markdown, and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.growth.cells import difference_cell, loss_cell, mean_cell, saving_cell, short_cell
from benchmarks.growth.experiment import Experiment, best_rate, tuning_jobs
from benchmarks.growth.frontier import anytime_table, claims, frontier_table, protocol_table, trunks
from benchmarks.growth.groups import Group, decayed, difference, groups, savings_of
from benchmarks.growth.growths import growth_table
from benchmarks.growth.predicted import law_table
from benchmarks.growth.results import Results
from benchmarks.growth.savings import spread


def report(experiment: Experiment, results: Results, out: Path | None) -> str:
    """The tables; with `out` they and the pictures are written there, named after the experiment."""
    found = groups(experiment, results)
    judged = claims(experiment, results, found)
    parts = [
        "## Learning rates", tuning_table(experiment, results),
        "## Arms", arms_table(experiment, found),
        "## Against the best fixed size", frontier_table(experiment, judged),
        "## One run at every budget", anytime_table(experiment, judged),
        "## Protocol", protocol_table(experiment, judged),
        "## Growths", growth_table(found),
        "## Against a law", law_table(experiment, found),
    ]  # fmt: skip
    text = "\n\n".join(parts) + "\n"
    if out is not None:
        from benchmarks.growth.pictures import draw_anytime, draw_arms, draw_curves

        out.mkdir(parents=True, exist_ok=True)
        (out / f"{experiment.name}.md").write_text(f"# {experiment.name}\n\n{text}", encoding="utf-8")
        draw_curves(experiment, found, out / f"{experiment.name}-curves.png")
        draw_arms(experiment, found, out / f"{experiment.name}-arms.png")
        if trunks(experiment):
            draw_anytime(experiment, found, out / f"{experiment.name}-anytime.png")
    return text


def tuning_table(experiment: Experiment, results: Results) -> str:
    """Every rate that was tried. One at the end of its list may not be the best there is, and is marked."""
    lines = ["| arm | budget | losses by learning rate | chosen | best by a parabola |", "|---|---|---|---|---|"]
    for arm, spec in experiment.arms.items():
        for budget in experiment.tuned_at(arm) if spec.lr.tune is not None else ():
            tried = [(job.lr, results.loss_of(job)) for job in tuning_jobs(experiment, arm, [budget])]
            losses = ", ".join(f"{lr:g}: {loss_cell(loss)}" for lr, loss in tried)
            best = best_rate(experiment, arm, budget, results.loss_of)
            edge = best is not None and len(tried) > 1 and best in (min(tried)[0], max(tried)[0])
            chosen = "–" if best is None else f"{best:g}" + (" (at the end of the list!)" if edge else "")
            fitted = parabola([(lr, loss) for lr, loss in tried if loss is not None and math.isfinite(loss)])
            between = "–" if fitted is None else f"{fitted:.2g}"
            lines.append(f"| {arm} | {budget:g} | {losses} | {chosen} | {between} |")
    return "\n".join(lines)


def parabola(tried: Sequence[tuple[float, float]]) -> float | None:
    """The learning rate at the bottom of the parabola, in the rate's logarithm, through the best of some (rate, loss)
    and its two neighbours; None where it has not two."""
    rates = sorted(tried)
    at = min(range(len(rates)), key=lambda i: rates[i][1], default=0)
    if not 0 < at < len(rates) - 1:
        return None
    (x, a), (y, b), (z, c) = ((math.log(rate), loss) for rate, loss in rates[at - 1 : at + 2])
    left, right = (b - a) / (y - x), (c - b) / (z - y)  # slopes at the middle of either half
    return math.exp((x + y) / 2 - left * (z - x) / 2 / (right - left))  # left < 0: the first of the best is the best


def arms_table(experiment: Experiment, found: Sequence[Group]) -> str:
    """A line for each arm and budget: its final loss, how it differs from `versus` seed by seed, and S (of a model that
    ends smaller than the reference too: see the parameters)."""
    lines = [
        f"| arm | | budget | parameters | seeds | loss | less than {experiment.versus} by | S | tokens | a parameter "
        "| minutes of steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group in found:
        runs = group.finite
        failures = len(group.runs) - len(runs)
        if not runs:
            lines.append(f"| {group.arm} | | {group.budget:g} | – | {failures} failed | – | – | – | – | – | – |")
            continue
        cells = [
            group.arm,
            experiment.arms[group.arm].about,
            f"{group.budget:g}",
            ", ".join(f"{n / 1e6:.2f}M" for n in sorted({run.n_params for run in runs})),
            f"{len(runs)}" + (f", {failures} failed" if failures else ""),
            mean_cell(spread([run.loss for run in runs])),
            difference_cell(difference(experiment, found, group)),
            saving_cell(savings_of(experiment, found, group), len(runs))
            if decayed(experiment, group)
            else "not decayed",
            f"{statistics.fmean(run.tokens for run in runs) / 1e6:.2f}M",
            short_cell(statistics.fmean(run.tokens / run.n_params for run in runs)),
            f"{60 * statistics.fmean(run.hours for run in runs):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
