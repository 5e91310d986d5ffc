"""A law of losses, L(N, D) = E + A / N^alpha + B / D^beta, fitted to the final losses of finished runs.

Hoffmann et al. 2022 (arXiv 2203.15556) minimise a Huber loss of log L from many starting points. Here alpha and beta
are searched on grids, each finer than the one before. For given exponents the law is linear in E, A and B >= 0, which
are solved for exactly. So the answer is the same every time, and a few runs are enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megabus.config.schema import ScalingLaw
from megabus.errors import UserError

COARSE = 0.025
EXPONENTS = np.arange(0.05, 1.2001, COARSE)
FINER = (COARSE / 5, COARSE / 25, COARSE / 125)  # steps of the grids around the best so far
MOVES = 50  # of each grid at most: more than it takes to cross the coarse one


@dataclass(frozen=True)
class LawFit:
    """A law, and how well it fits: the root mean square in nats of the residuals, taken over the degrees of freedom
    that the law's coefficients leave. n_points: the runs that were used."""

    law: ScalingLaw
    rms: float
    n_points: int


def fit_law(points: Sequence[tuple[float, float, float]]) -> LawFit:
    """points: (parameters, tokens, final loss in nats) of runs whose learning rate has decayed.

    Raises `UserError` with fewer than 6 different runs: five coefficients, and one more to tell how well they fit (runs
    of the same size and token count count once). Also with fewer than 3 sizes or 3 token counts, since a power law of
    any exponent goes through two losses. Also where the runs show no law: the best exponent lies at an end of its
    range, or the loss does not fall with the size or with the tokens.
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
    law = ScalingLaw(E=float(E), A=float(A * n0**alpha), B=float(B * d0**beta), alpha=alpha, beta=beta)
    return LawFit(law, math.sqrt(squares / (len(rows) - len(ScalingLaw.model_fields))), len(rows))


def _best_exponents(squares: Callable[[tuple[float, float]], float]) -> tuple[float, float]:
    """alpha and beta with the least sum of squares: on a coarse grid, then on ever finer ones around the best so far.

    An error of one exponent can be made up for by the other, so the valley of the squares is long and narrow. Hence a
    finer grid moves along for as long as it finds something better.
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
    """Least squares with coefficients >= 0, as (x, sum of squares): every choice of columns is solved without the
    bound, and the best solution that keeps it is taken."""
    best, found = float(y @ y), np.zeros(columns.shape[1])
    for count in range(1, columns.shape[1] + 1):
        for chosen in map(list, itertools.combinations(range(columns.shape[1]), count)):
            x, *_ = np.linalg.lstsq(columns[:, chosen], y, rcond=None)
            squares = float(np.sum((y - columns[:, chosen] @ x) ** 2))
            if (x >= 0).all() and squares < best:
                best, found = squares, np.zeros(columns.shape[1])
                found[chosen] = x
    return found, best
