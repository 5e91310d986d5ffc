"""Coefficients of L(N, D) = E + A / N^alpha + B / D^beta from losses of finished runs.

Hoffmann et al. 2022 (arXiv 2203.15556) minimise a Huber loss of log L from many starts. Here the exponents run over a
grid and the rest, linear in E, A, B >= 0, is solved exactly: the same answer every time, from few points too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megabus.errors import UserError

EXPONENTS = np.arange(0.05, 1.2001, 0.025)


@dataclass(frozen=True)
class FittedLaw:
    """Coefficients by their names in the configuration, and the root mean square of the residuals in nats."""

    coefficients: dict[str, float]
    rms: float
    n_points: int


def fit_law(points: Sequence[tuple[float, float, float]]) -> FittedLaw:
    """points: (parameters, tokens, final loss in nats) of runs whose learning rate has decayed.

    Raises `UserError` with fewer than 6 points, or fewer than 2 sizes or 3 token counts: five coefficients need them.
    """
    rows = [p for p in points if all(math.isfinite(x) and x > 0 for x in p)]
    sizes, counts = len({p[0] for p in rows}), len({p[1] for p in rows})
    if len(rows) < 6 or sizes < 2 or counts < 3:
        found = f"{len(rows)} run(s) of {sizes} size(s) and {counts} token count(s)"
        raise UserError("runs", found, "are too few to fit five coefficients to", "give 6 or more, of 2 or more sizes")
    n, d, loss = np.array(rows).T
    n0, d0 = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())  # near 1, so that columns are of one scale
    best: tuple[float, tuple[float, ...]] = (math.inf, ())
    for alpha, beta in itertools.product(EXPONENTS, EXPONENTS):
        columns = np.stack([np.ones_like(n), (n / n0) ** -alpha, (d / d0) ** -beta], axis=1)
        (E, A, B), squares = _nonnegative(columns, loss)
        if squares < best[0]:
            best = (squares, (E, A * n0**alpha, B * d0**beta, float(alpha), float(beta)))
    squares, found_best = best
    names = ("E", "A", "B", "alpha", "beta")
    return FittedLaw(dict(zip(names, map(float, found_best), strict=True)), math.sqrt(squares / len(rows)), len(rows))


def _nonnegative(columns: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, float]:
    """Least squares with coefficients >= 0: the best of all choices of columns whose own solution is. (x, squares)."""
    best, found = float(y @ y), np.zeros(columns.shape[1])
    for count in range(1, columns.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(columns.shape[1]), count)):
            x, *_ = np.linalg.lstsq(columns[:, chosen], y, rcond=None)
            squares = float(np.sum((y - columns[:, chosen] @ x) ** 2))
            if (x >= 0).all() and squares < best:
                best, found = squares, np.zeros(columns.shape[1])
                found[chosen] = x
    return found, best
