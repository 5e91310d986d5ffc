"""What an experiment's results say: tables in markdown, and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.growth.experiment import Experiment, best_rate, tuning_jobs
from benchmarks.growth.groups import Group, difference, groups, savings_of
from benchmarks.growth.predicted import law_table
from benchmarks.growth.results import Results
from benchmarks.growth.savings import Bound, Spread, spread


def report(experiment: Experiment, results: Results, out: Path | None) -> str:
    """The tables; with `out` they and the pictures are written there, named after the experiment."""
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
    lines = ["| arm | budget | losses by learning rate | chosen | best by a parabola |", "|---|---|---|---|---|"]
    for arm in experiment.arms:
        if experiment.arms[arm].lr.tune is None:
            continue
        tried = [(job.lr, results.loss_of(job)) for job in tuning_jobs(experiment, arm)]
        losses = ", ".join(f"{lr:g}: {_loss(loss)}" for lr, loss in tried)
        best = best_rate(experiment, arm, results.loss_of)
        edge = best is not None and len(tried) > 1 and best in (min(tried)[0], max(tried)[0])
        chosen = "–" if best is None else f"{best:g}" + (" (at the end of the list!)" if edge else "")
        fitted = parabola([(lr, loss) for lr, loss in tried if loss is not None and math.isfinite(loss)])
        between = "–" if fitted is None else f"{fitted:.2g}"
        lines.append(f"| {arm} | {experiment.tune_budget:g} | {losses} | {chosen} | {between} |")
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
            _mean(spread([run.loss for run in runs])),
            _difference(difference(experiment, found, group)),
            _saving(savings_of(experiment, found, group), len(runs)),
            f"{statistics.fmean(run.tokens for run in runs) / 1e6:.2f}M",
            _short(statistics.fmean(run.tokens / run.n_params for run in runs)),
            f"{60 * statistics.fmean(run.hours for run in runs):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _loss(loss: float | None) -> str:
    return "to do" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "failed"


def _mean(value: Spread) -> str:
    return f"{value.mean:.4f}" + ("" if value.std is None else f" ± {value.std:.4f}")


def _difference(value: Spread | None) -> str:
    if value is None:
        return "–"
    interval = "" if value.interval is None else f" ({value.interval[0]:+.4f} to {value.interval[1]:+.4f})"
    return f"{value.mean:+.4f}{interval}"


def _saving(found: tuple[Spread, Bound] | None, seeds: int) -> str:
    """With its interval, and how many seeds it is of where that is not all."""
    if found is None:
        return "–"
    value, bound = found
    interval = "" if value.interval is None else f" ({value.interval[0]:.2f} to {value.interval[1]:.2f})"
    mean = math.floor(100 * value.mean + 1e-9) / 100 if bound == ">" else value.mean  # a bound holds as it is printed
    return f"{bound}{mean:.2f}{interval}" + ("" if value.n == seeds else f", {value.n} seed{'s' * (value.n > 1)}")
