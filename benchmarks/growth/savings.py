"""S against the final size, and statistics over seeds. S* against the best fixed size is in ladder.py.

S = FLOPs that the reference (from scratch, final size, own tuned learning rate) needs to reach the loss L* that a run
ended with, over all FLOPs of that run. Both losses are decayed ones: the reference's FLOPs at L* lie between those of
its runs of several budgets, each with its own decay, by straight lines of log FLOPs against loss. Between budgets a
factor of 2 apart such a line lies above the true curve, and S comes out up to some 4% too large.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

# Student's t, 97.5%, by degrees of freedom: for 95% intervals over few seeds.
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
Bound = Literal["", ">", "<", "~"]  # "~": some runs have one bound and some the other


@dataclass(frozen=True)
class Saving:
    """One run's S. bound: `>` where the reference's largest run did not reach the loss (S is more than `value`), `<`
    where its smallest went below it."""

    value: float
    bound: Bound = ""


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, standard deviation (None for one seed) and 95% interval of the mean (None for one seed)."""

    mean: float
    std: float | None
    interval: tuple[float, float] | None
    n: int


def saving(loss: float, flops: float, reference: Sequence[tuple[float, float]]) -> Saving | None:
    """S of a run that ended at `loss` after `flops`, by the reference's (FLOPs, decayed loss); None without any."""
    points = falling(reference)
    if not points:
        return None
    for (c0, l0), (c1, l1) in pairwise(points):
        if l1 <= loss <= l0:
            way = (l0 - loss) / (l0 - l1)
            return Saving(math.exp(math.log(c0) + way * (math.log(c1) - math.log(c0))) / flops)
    if loss < points[-1][1]:
        return Saving(points[-1][0] / flops, ">")
    return Saving(points[0][0] / flops, "" if loss == points[0][1] else "<")


def falling(reference: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points at which more FLOPs were of use: a reference is as good as its best run of no more FLOPs."""
    points: list[tuple[float, float]] = []
    for flops, loss in sorted(reference):
        if math.isfinite(loss) and (not points or loss < points[-1][1]):
            points.append((flops, loss))
    return points


def quantile(freedom: int) -> float:
    """Student's t, 97.5%; beyond the table by its series in 1/degrees of freedom, right to a thousandth."""
    return T975.get(freedom) or 1.95996 + 2.37227 / freedom + 2.82250 / freedom**2 + 2.55585 / freedom**3


def spread(values: Sequence[float]) -> Spread:
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return Spread(mean, None, None, 1)
    std = statistics.stdev(values)
    half = quantile(n - 1) * std / math.sqrt(n)
    return Spread(mean, std, (mean - half, mean + half), n)


def overall(savings: Sequence[Saving]) -> tuple[Spread, Bound]:
    """Geometric mean of S over seeds with its interval; with a bound where that of any run has one (no interval)."""
    logs = spread([math.log(s.value) for s in savings])
    bounds = {s.bound for s in savings} - {""}
    bound: Bound = "~" if len(bounds) > 1 else next(iter(bounds), "")
    interval = None if logs.interval is None or any(s.bound for s in savings) else logs.interval
    scaled = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
    return Spread(math.exp(logs.mean), None, scaled, logs.n), bound
