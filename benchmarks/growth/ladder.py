"""S*, the figure that decides: a run against the best fixed size, whichever that is at its FLOPs.

S* = FLOPs that the best of the fixed sizes needs to reach the loss that a run ended with, over all FLOPs of that run.
The sizes are the arms that are marked `ladder`, each with decayed runs of several budgets. The envelope is the lowest
of their losses at each FLOPs, by straight lines of log FLOPs against loss within a size, never beyond its smallest and
its largest run. It is open where a size that was not run might be the best. A size cannot be the best with more FLOPs
than in its largest run if a larger size is as good there already, nor with fewer than in its smallest run if a smaller
size is: more FLOPs favour larger sizes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.growth.experiment import Experiment
from benchmarks.growth.groups import Group, decayed
from benchmarks.growth.savings import Saving, falling, saving

SAME = 1.01  # a run ends with a whole step: FLOPs that differ by less than this factor are one budget


@dataclass(frozen=True)
class Size:
    """A fixed size's decayed losses. points: (FLOPs, loss), falling. end: FLOPs of its largest run. paired: of the seed
    that was asked for, else means over those that there are."""

    arm: str
    n_params: float
    points: list[tuple[float, float]]
    end: float
    paired: bool

    @property
    def start(self) -> float:
        return self.points[0][0]

    def loss_at(self, flops: float) -> float | None:
        """Between its smallest and its largest run; None beyond."""
        if not self.start / SAME <= flops <= self.end * SAME:
            return None
        for (c0, l0), (c1, l1) in pairwise(self.points):
            if flops <= c1:
                way = math.log(max(flops, c0) / c0) / math.log(c1 / c0)
                return l0 + way * (l1 - l0)
        return self.points[-1][1]


@dataclass(frozen=True)
class Best:
    """The lowest known loss of the sizes at some FLOPs, and whose. is_open: a size that was not run may lie lower."""

    loss: float
    arm: str
    is_open: bool


def sizes_of(experiment: Experiment, found: Sequence[Group], seed: int) -> list[Size]:
    """The ladder as a seed has it. A size that has no run of the seed stands in with the means of its other seeds."""
    sizes = []
    for arm, spec in experiment.arms.items():
        mine = [g for g in found if g.arm == arm and g.finite and decayed(experiment, g)] if spec.ladder else []
        if mine:
            own = [run for g in mine for run in g.finite if run.seed == seed]
            means = [_mean([(run.flops, run.loss) for run in g.finite]) for g in mine]
            points = [(run.flops, run.loss) for run in own] or means
            end = max(flops for flops, _ in points)
            sizes.append(Size(arm, mine[0].finite[0].n_params, falling(points), end, bool(own)))
    return sizes


def envelope(sizes: Sequence[Size], flops: float) -> Best | None:
    """None where no size was run."""
    known = [(loss, size.arm) for size in sizes if (loss := size.loss_at(flops)) is not None]
    if not known:
        return None
    unknown = [size for size in sizes if size.loss_at(flops) is None]
    is_open = any(_may_lead_after(s, sizes) if s.end < flops else _may_lead_before(s, sizes) for s in unknown)
    return Best(*min(known), is_open)


def saving_by_best(loss: float, flops: float, sizes: Sequence[Size]) -> Saving | None:
    """S* of a run that ended at `loss` after `flops`; None without sizes.

    Bounds are those of S, and `<` too where another size than the one that is known to have reached the loss might have
    done so with fewer FLOPs, had it been run there.
    """
    if not sizes:
        return None
    least, most = math.inf, math.inf  # FLOPs that the best size needs: at least, at most
    for size in sizes:
        reached = saving(loss, 1.0, size.points)
        assert reached is not None  # a size has points
        if reached.bound == ">":
            least = min(least, size.end) if _may_lead_after(size, sizes) else least
            continue
        most = min(most, reached.value)
        if reached.bound == "":
            least = min(least, reached.value)
        elif _may_lead_before(size, sizes):
            least = 0.0
    if math.isinf(most):
        return Saving(least / flops, ">")
    return Saving(most / flops, "" if least * SAME >= most else "<")


def _may_lead_after(size: Size, sizes: Sequence[Size]) -> bool:
    """Whether a size might be the best of all with more FLOPs than it was given."""
    return not any(_is_as_good(other, size, size.end) for other in sizes if other.n_params > size.n_params)


def _may_lead_before(size: Size, sizes: Sequence[Size]) -> bool:
    """The same with fewer."""
    return not any(_is_as_good(other, size, size.start) for other in sizes if other.n_params < size.n_params)


def _is_as_good(other: Size, size: Size, flops: float) -> bool:
    theirs, its = other.loss_at(flops), size.loss_at(flops)
    return theirs is not None and its is not None and theirs <= its


def _mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.fmean(a for a, _ in pairs), statistics.fmean(b for _, b in pairs)
