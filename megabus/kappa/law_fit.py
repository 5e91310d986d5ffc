"""Coefficients of L(N, D) = E + A / N^alpha + B / D^beta from losses of finished runs.

Hoffmann et al. 2022 (arXiv 2203.15556) minimise a Huber loss of log L from many starts. Here the exponents run over
grids, each finer than the one before, and the rest, linear in E, A, B >= 0, is solved exactly: the same answer every
time, from few points too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megabus.errors import UserError

COARSE = 0.025
EXPONENTS = np.arange(0.05, 1.2001, COARSE)
FINER = (COARSE / 5, COARSE / 25, COARSE / 125)  # steps of the grids around the best so far
MOVES = 50  # of each: more than the way across the coarse grid takes
NAMES = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True)
class FittedLaw:
    """Coefficients by their names in the configuration, and the root mean square in nats of the residuals, for as many
    degrees of freedom as five coefficients leave."""

    coefficients: dict[str, float]
    rms: float
    n_points: int


def fit_law(points: Sequence[tuple[float, float, float]]) -> FittedLaw:
    """points: (parameters, tokens, final loss in nats) of runs whose learning rate has decayed.

    The coefficients always make a `config.schema.ScalingLaw`. Raises `UserError` with fewer than 6 different runs (of
    one size and token count they count once: five coefficients, and one to tell how well they fit), or fewer than 3
    sizes or 3 token counts: through two losses goes a power law of any exponent. And where the runs tell no law: a best
    exponent at an end of its range, or a loss that does not fall with the size or with the tokens.
    """
    rows = [p for p in points if all(math.isfinite(x) and x > 0 for x in p)]
    sizes, counts, pairs = (len({p[part] for p in rows}) for part in (slice(0, 1), slice(1, 2), slice(0, 2)))
    found = f"{len(rows)} run(s) of {sizes} size(s) and {counts} token count(s)"
    if pairs < 6 or sizes < 3 or counts < 3:
        remedy = "give 6 or more that differ in size or tokens, of 3 or more sizes and 3 or more token counts"
        raise UserError("runs", found, "are too few to fit five coefficients to", remedy)
    n, d, loss = np.array(rows).T
    n0, d0 = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())  # near 1, so that columns are of one scale

    def fitted(exponents: tuple[float, float]) -> tuple[float, np.ndarray]:
        alpha, beta = exponents
        columns = np.stack([np.ones_like(n), (n / n0) ** -alpha, (d / d0) ** -beta], axis=1)
        x, squares = _nonnegative(columns, loss)
        return squares, x

    alpha, beta = _best_exponents(lambda exponents: fitted(exponents)[0])
    squares, (E, A, B) = fitted((alpha, beta))
    for name, amount, by in (("A", A, "size"), ("B", B, "tokens")):
        if amount <= 0:
            problem = f"tell no law: {name} comes out 0, as if the loss did not fall with the {by}"
            raise UserError("runs", found, problem, "give finished runs of one kind of model that are further apart")
    for name, exponent in (("alpha", alpha), ("beta", beta)):
        if not EXPONENTS[0] + FINER[-1] / 2 < exponent < EXPONENTS[-1] - FINER[-1] / 2:
            problem = f"tell no law: {name} comes out at the end of its range, {exponent:.3g}"
            raise UserError("runs", found, problem, "give finished runs of one kind of model that are further apart")
    coefficients = dict(zip(NAMES, map(float, (E, A * n0**alpha, B * d0**beta, alpha, beta)), strict=True))
    return FittedLaw(coefficients, math.sqrt(squares / (len(rows) - len(NAMES))), len(rows))


def _best_exponents(squares: Callable[[tuple[float, float]], float]) -> tuple[float, float]:
    """alpha and beta of the fewest squares: of a coarse grid, then of ever finer ones around the best so far.

    A finer grid moves along while its best lies at its border: errors of the exponents make up for each other, so the
    valley is long and narrow.
    """
    best = min(((float(a), float(b)) for a, b in itertools.product(EXPONENTS, EXPONENTS)), key=squares)
    for step in FINER:
        least = squares(best)
        for _ in range(MOVES):
            around = [np.clip(x + step * np.arange(-5, 6), EXPONENTS[0], EXPONENTS[-1]) for x in best]
            found = min(((float(a), float(b)) for a, b in itertools.product(*around)), key=squares)
            if squares(found) >= least:
                break
            best, least = found, squares(found)
    return best


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
