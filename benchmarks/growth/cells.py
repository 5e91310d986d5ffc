"""What stands in the cells of an experiment's tables."""

from __future__ import annotations

import math

from benchmarks.growth.savings import Bound, Spread


def short_cell(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def loss_cell(loss: float | None) -> str:
    return "to do" if loss is None else f"{loss:.4f}" if math.isfinite(loss) else "failed"


def mean_cell(value: Spread) -> str:
    return f"{value.mean:.4f}" + ("" if value.std is None else f" ± {value.std:.4f}")


def difference_cell(value: Spread | None) -> str:
    if value is None:
        return "–"
    interval = "" if value.interval is None else f" ({value.interval[0]:+.4f} to {value.interval[1]:+.4f})"
    return f"{value.mean:+.4f}{interval}"


def saving_cell(found: tuple[Spread, Bound] | None, seeds: int) -> str:
    """With its interval, and how many seeds it is of where that is not all."""
    if found is None:
        return "–"
    value, bound = found
    interval = "" if value.interval is None else f" ({value.interval[0]:.2f} to {value.interval[1]:.2f})"
    return (
        bound_cell(value.mean, bound)
        + interval
        + ("" if value.n == seeds else f", {value.n} seed{'s' * (value.n > 1)}")
    )


def bound_cell(value: float, bound: Bound) -> str:
    """A bound from below holds as it is printed."""
    return f"{bound}{math.floor(100 * value + 1e-9) / 100 if bound == '>' else value:.2f}"
