"""Pictures of an experiment: loss against FLOPs with bands over seeds, and how far arms' final losses lie apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.growth.experiment import MOST_DRAWN, Experiment
from benchmarks.growth.frontier import trunks
from benchmarks.growth.groups import Group, decayed, difference
from megabus.report.figure import COLOURS, FAINT, INK, dress, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_curves(experiment: Experiment, found: Sequence[Group], path: Path) -> None:
    """The arms with `drawn`, at their largest budget: mean over seeds, a band from the lowest to the highest, a tick at
    each growth; dots are decayed losses of other budgets."""
    names = [name for name, arm in experiment.arms.items() if arm.drawn]
    with _picture(path, 9.6, 5.0) as axes:
        for colour, name in zip(COLOURS[:MOST_DRAWN], names, strict=False):
            mine = [group for group in found if group.arm == name and group.finite]
            if mine:
                _draw_arm(axes, mine, colour, f"{name}: {experiment.arms[name].about}")
        axes.set_xscale("log")
        axes.set_xlabel("training compute (FLOPs), all stages counted", labelpad=6)
        axes.set_ylabel("validation loss (nats per token)", labelpad=6)
        low, high = axes.get_ylim()
        axes.set_ylim(low, min(high, low + 2.2))
        if axes.lines:
            axes.legend(loc="upper right", frameon=True, framealpha=0.92, edgecolor="none", fontsize=9)


def _draw_arm(axes: Axes, mine: Sequence[Group], colour: str, label: str) -> None:
    largest = max(mine, key=lambda group: group.budget)
    runs = largest.finite
    start = max(next(p.flops for p in run.curve if p.flops > 0) for run in runs)
    end = min(run.flops for run in runs)
    grid = np.geomspace(start, end, 200)
    losses = np.array([np.interp(grid, [p.flops for p in run.curve], [p.loss for p in run.curve]) for run in runs])
    axes.plot(grid, losses.mean(0), color=colour, linewidth=1.6, label=label, zorder=3)
    axes.fill_between(grid, losses.min(0), losses.max(0), color=colour, alpha=0.18, linewidth=0, zorder=2)
    for run in runs:
        for growth in run.growths:
            at = growth["flops"]
            axes.plot([at], [np.interp(at, grid, losses.mean(0))], marker="|", markersize=13, color=colour, zorder=4)
    for group in mine:
        mean = np.mean([run.loss for run in group.finite])
        axes.plot([group.finite[0].flops], [mean], marker="o", markersize=4.5, color=colour, zorder=5)


def draw_arms(experiment: Experiment, found: Sequence[Group], path: Path) -> None:
    """By how much each arm's final loss lies below that of `versus`, at equal FLOPs, with 95% intervals over seeds."""
    pairs = [(group, difference(experiment, found, group)) for group in found]
    rows = sorted(((g, d) for g, d in pairs if d is not None), key=lambda pair: pair[1].mean)
    with _picture(path, 9.6, 1.1 + 0.3 * max(len(rows), 1)) as axes:
        for y, (_, gain) in enumerate(rows):
            low, high = gain.interval or (gain.mean, gain.mean)
            colour = FAINT if low <= 0 <= high else COLOURS[0] if gain.mean > 0 else COLOURS[1]
            axes.plot([low, high], [y, y], color=colour, linewidth=1.6)
            axes.plot([gain.mean], [y], marker="o", markersize=5, color=colour)
        labels = [
            f"{g.arm}: {experiment.arms[g.arm].about}, x{g.budget:g} ({d.n} seed{'s' * (d.n > 1)})" for g, d in rows
        ]
        axes.set_yticks(range(len(rows)), labels)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel(f"final loss below that of `{experiment.versus}` (nats)", labelpad=6)


def draw_anytime(experiment: Experiment, found: Sequence[Group], path: Path) -> None:
    """Decayed losses over FLOPs: of each fixed size of the ladder, in grey, and of the arms that are one trunk, whose
    decays are its dots. Means over seeds, bars from the lowest to the highest."""
    with _picture(path, 9.6, 5.0) as axes:
        colours = iter(COLOURS)
        styles = iter(("-", "--", "-.", ":") * len(experiment.arms))
        for arm, spec in experiment.arms.items():
            mine = [group for group in found if group.arm == arm and group.finite and decayed(experiment, group)]
            if not mine or not (spec.ladder or arm in trunks(experiment)):
                continue
            flops = [np.mean([run.flops for run in group.finite]) for group in mine]
            losses = np.array([[f(run.loss for run in group.finite) for f in (min, max)] for group in mine])
            means = np.array([np.mean([run.loss for run in group.finite]) for group in mine])
            colour, style = ("#8a939a", next(styles)) if spec.ladder else (next(colours, INK), "-")
            bars = np.abs(losses.T - means)
            axes.errorbar(
                flops, means, bars, color=colour, linestyle=style, marker="o", markersize=4.5, linewidth=1.4,
                elinewidth=0.8, label=f"{arm}: {spec.about}", zorder=2 if spec.ladder else 3,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlabel("training compute (FLOPs), all stages counted", labelpad=6)
        axes.set_ylabel("validation loss at the end (nats per token)", labelpad=6)
        if axes.containers:
            axes.legend(loc="upper right", frameon=True, framealpha=0.92, edgecolor="none", fontsize=9)


@contextmanager
def _picture(path: Path, width: float, height: float) -> Iterator[Axes]:
    with picture(path, (width, height), layout="constrained") as figure:
        axes = figure.add_subplot()
        dress(axes)
        yield axes
