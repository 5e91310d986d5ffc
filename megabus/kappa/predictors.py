"""mp, the final loss that the present size is predicted to reach: four predictors with one interface.

A predictor is a pure function of the stage and of the stage's validation losses. It returns a `Prediction`, or None
while it cannot tell. Losses are in nats per token; C is the FLOPs of the whole run.

| name | needs | trust it when |
|---|---|---|
| `fit` (default) | this stage's own losses | the learning rate is constant; it says how uncertain it is |
| `reference` | losses of trained models | they share tokenizer, data and recipe with this run |
| `scaling_law` | coefficients | they were fitted to this tokenizer and data |
| `constant` | the loss itself | it was measured before |

`fit` is the default because it is the only one that looks at this run. The other three bring a number from elsewhere,
and an error of a few hundredths of a nat in mp moves the point at which κ = 0.8 is reached by a large part of a stage.
Without a budget `fit` must extrapolate to infinity, which a short curve tells little about (its std says so). So give
stages caps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from megabus.config.schema import KappaConfig, ScalingLaw
from megabus.errors import UserError


class CurvePoint(NamedTuple):
    """One finite validation loss (nats per token) at these run totals of tokens and FLOPs."""

    tokens: int
    flops: float
    loss: float


@dataclass(frozen=True)
class StageSpan:
    """What κ must know of a stage: where it began, in run totals, and its own budget (None = no cap)."""

    index: int
    n_params: int
    kappa: float
    tokens: int = 0
    flops: float = 0.0
    max_tokens: int | None = None
    max_flops: float | None = None

    def budget(self, curve: Sequence[CurvePoint]) -> tuple[float, float] | None:
        """(tokens, FLOPs) this stage may spend, inf where open; None while FLOPs per token is unknown.

        Where both caps are set the tighter one counts. One converts to the other by the FLOPs per token of
        the curve, which is constant within a stage.
        """
        max_tokens = math.inf if self.max_tokens is None else float(self.max_tokens)
        max_flops = math.inf if self.max_flops is None else self.max_flops
        if math.isinf(max_tokens) and math.isinf(max_flops):
            return math.inf, math.inf
        if not curve or curve[-1].tokens <= self.tokens or curve[-1].flops <= self.flops:
            return None
        per_token = (curve[-1].flops - self.flops) / (curve[-1].tokens - self.tokens)
        tokens = min(max_tokens, max_flops / per_token)
        return tokens, tokens * per_token


@dataclass(frozen=True)
class Prediction:
    """A final loss (nats per token) and its standard deviation; std None = the predictor claims none."""

    loss: float
    std: float | None = None


class Predictor(Protocol):
    """(stage, its curve so far) -> its predicted final loss, or None while there is nothing to say."""

    def __call__(self, stage: StageSpan, curve: Sequence[CurvePoint]) -> Prediction | None: ...


def _require(ok: bool, key: str, value: object, problem: str, remedy: str) -> None:
    if not ok:
        raise UserError(f"growth.trigger.{key}", value, problem, remedy)


@dataclass(frozen=True)
class Constant:
    """The loss as given: one number for all stages, or one per stage (UserError at a stage without one)."""

    loss: float | Sequence[float]

    def __post_init__(self) -> None:
        losses = self.loss if isinstance(self.loss, Sequence) else [self.loss]
        ok = bool(losses) and all(isinstance(x, (int, float)) and 0 <= x < math.inf for x in losses)
        _require(ok, "constant", self.loss, "not a finite loss >= 0", "give nats per token")

    def __call__(self, stage: StageSpan, curve: Sequence[CurvePoint]) -> Prediction:
        if isinstance(self.loss, (int, float)):
            return Prediction(float(self.loss))
        _require(
            stage.index < len(self.loss),
            "constant",
            self.loss,
            f"has no entry for stage {stage.index}",
            "give one loss per stage, or a single number",
        )
        return Prediction(float(self.loss[stage.index]))


@dataclass(frozen=True)
class FromLaw:
    """What a law L(N, D) says, with N all parameters and D the stage's token budget, or infinity when it has none.

    The coefficients that a configuration has by default are those of Hoffmann et al. 2022 (arXiv 2203.15556), section
    D.2. They hold for MassiveText and a 32k tokenizer, and a later fit of the same points (arXiv 2404.10102) differs.
    On other data they are off by tenths of a nat: fit the law to runs of your own first. D leaves out the tokens that
    the smaller sizes read, so mp comes out rather too high, and the model grows rather too early.
    """

    law: ScalingLaw

    def __call__(self, stage: StageSpan, curve: Sequence[CurvePoint]) -> Prediction | None:
        budget = stage.budget(curve)
        return None if budget is None else Prediction(self.law.loss(stage.n_params, budget[0]))


@dataclass(frozen=True)
class Reference:
    """Final losses of existing models, (n_params, loss) rows, linear in log N between them.

    Beyond the table's ends the nearest segment is extended, never below 0. Losses are convex in log N, so an extended
    segment lies below the truth: mp is too low, the stage lasts longer, and its cap ends it. Taking the table's last
    loss instead would be too high, and end a size larger than the table's where the largest one in it would have ended.
    """

    table: Sequence[tuple[float, float]]

    def __post_init__(self) -> None:
        rows, key = self.table, "reference"
        _require(
            len(rows) >= 2,
            key,
            self.table,
            "needs at least 2 rows of (n_params, loss)",
            "add models, or use the predictor `constant`",
        )
        _require(
            rows[0][0] > 0 and all(low[0] < high[0] for low, high in itertools.pairwise(rows)),
            key,
            self.table,
            "n_params is not positive and strictly increasing",
            "sort the rows and drop duplicates",
        )
        ok = all(math.isfinite(loss) and loss >= 0 for _, loss in rows)
        _require(ok, key, self.table, "holds a loss that is not finite and >= 0", "give nats per token")

    def __call__(self, stage: StageSpan, curve: Sequence[CurvePoint]) -> Prediction:
        log_n = [math.log(n) for n, _ in self.table]
        x = math.log(stage.n_params)
        i = min(max(int(np.searchsorted(log_n, x)) - 1, 0), len(log_n) - 2)
        share = (x - log_n[i]) / (log_n[i + 1] - log_n[i])
        low, high = self.table[i][1], self.table[i + 1][1]
        return Prediction(max(0.0, low + share * (high - low)))


@dataclass(frozen=True)
class Fit:
    """A power law fitted to this stage's own curve: L(C) = E + A C^-b (see `fit_power_law`).

    mp = L at the end of the stage's budget, or the asymptote E when it has none. C counts from the start of the run,
    not of the stage: growth keeps the loss, so the curve goes on from a finite C.
    An evaluation's weight is the share of the stage that was done by then: the first ones show warm-up, or recovery
    after a growth, rather than the law. The law knows no decay of the learning rate: mp is that of the present rate.
    None before `min_points` evaluations at different C. The losses are not smoothed: after an exponential moving
    average with a decay of 0.9 the same fit was wrong by 14 of its std instead of 1, because the average lags and
    correlates the residuals.
    """

    min_points: int

    def __post_init__(self) -> None:
        ok = self.min_points >= 5
        _require(ok, "min_evals", self.min_points, "too few for the 3 coefficients of `fit`", "use 5 or more")

    def __call__(self, stage: StageSpan, curve: Sequence[CurvePoint]) -> Prediction | None:
        budget = stage.budget(curve)
        points = [p for p in curve if p.flops > stage.flops and math.isfinite(p.loss)]
        if budget is None or len({p.flops for p in points}) < self.min_points:
            return None
        c = np.array([p.flops for p in points])
        loss = np.array([p.loss for p in points])
        weight = (c - stage.flops) / (c.max() - stage.flops)
        return fit_power_law(c, loss, weight).predict(stage.flops + budget[1])


@dataclass(frozen=True)
class PowerLaw:
    """L(C) = E + A (C / c0)^-b, with the other exponents the data allow (`grid`) for its uncertainty.

    `grid` rows are (E, A, b, p) with p their normalised likelihood; `cov` holds, per row, the covariance of
    (E, A) at that b as (var E, var A, cov).
    """

    E: float
    A: float
    b: float
    c0: float
    grid: np.ndarray
    cov: np.ndarray

    def __call__(self, flops: float) -> float:
        return self.E + self.A * float(np.exp(-self.b * np.log(flops / self.c0)))

    def predict(self, flops: float) -> Prediction:
        """L at `flops` (inf: E), its std over exponents and, at each exponent, over (E, A)."""
        E, A, b, p = self.grid.T
        x = np.exp(-b * np.log(flops / self.c0))
        var = self.cov[:, 0] + x**2 * self.cov[:, 1] + 2 * x * self.cov[:, 2]
        best = self(flops)
        return Prediction(best, float(np.sqrt(np.sum(p * (np.maximum(var, 0) + (E + A * x - best) ** 2)))))


_B_RANGE = (0.02, 8.0)  # from nearly logarithmic to nearly exponential over a short stage
_HUBER = 1.345  # 95% efficiency under Gaussian noise


def fit_power_law(c: np.ndarray, loss: np.ndarray, weight: np.ndarray) -> PowerLaw:
    """Robust weighted fit of L = E + A (c / min c)^-b with E, A >= 0.

    c: (n,) FLOPs > 0, not all equal; loss: (n,) finite; weight: (n,) >= 0.
    For a fixed b the law is linear in (E, A), solved in closed form, so only b is searched: a grid in log b,
    zoomed. Huber reweighting keeps outliers out. The likelihood of b, its noise scale integrated out, is
    RSS(b)^(-(n-3)/2): averaging over it keeps the std honest where the curve does not tell b, which is most
    of a stage, and where b sits at an end of its range, where a Gauss-Newton covariance means nothing.
    """
    log_c = np.log(c / c.min())
    weight = weight / weight.max()
    span = np.log(_B_RANGE)
    w = weight
    for _ in range(6):
        low, high = span
        for _ in range(8):  # each zoom narrows the bracket 8-fold
            b = np.exp(np.linspace(low, high, 33))
            E, A, rss, _ = _solve(log_c, loss, w, b)
            i = int(np.argmin(rss))
            low, high = np.log(b[max(i - 2, 0)]), np.log(b[min(i + 2, 32)])
        best = (float(E[i]), float(A[i]), float(b[i]))
        r = np.abs(loss - best[0] - best[1] * np.exp(-best[2] * log_c))
        scale = 1.4826 * float(np.median(r))
        if scale <= 1e-12 * float(np.abs(loss).max()):
            break  # an exact fit has no outliers to tame
        w = weight * np.minimum(1.0, _HUBER * scale / np.maximum(r, 1e-300))

    freedom = max(float(w.sum() ** 2 / np.sum(w**2)) - 3.0, 1.0)  # Kish's effective n, less 3 coefficients
    floor = (1e-12 * float(np.abs(loss).max())) ** 2 * w.sum() + 1e-300
    low, high = span
    for _ in range(5):  # zoom to where the likelihood lives: a sharp one would fall between grid points
        grid_b = np.exp(np.linspace(low, high, 97))
        E, A, rss, cov = _solve(log_c, loss, w, grid_b)
        log_p = -0.5 * freedom * np.log((rss + floor) / (rss.min() + floor))
        likely = np.flatnonzero(log_p > -12.0)
        low, high = np.log(grid_b[max(likely[0] - 1, 0)]), np.log(grid_b[min(likely[-1] + 1, 96)])
    p = np.exp(log_p)
    sigma2 = rss.min() / w.sum() * (freedom + 3.0) / freedom
    return PowerLaw(*best, float(c.min()), np.stack([E, A, grid_b, p / p.sum()], axis=1), cov * sigma2)


def _solve(
    log_c: np.ndarray, loss: np.ndarray, w: np.ndarray, b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Weighted least squares of loss = E + A x, x = exp(-b log_c), with E, A >= 0, for all exponents at once.

    log_c, loss, w: (n,); b: (B,). Returns E, A, RSS (B,) and (var E, var A, cov) / σ² (B, 3).
    """
    x = np.exp(-b[:, None] * log_c)  # (B, n), in (0, 1]
    total = w.sum()
    mean_x, mean_y = x @ w / total, float(loss @ w / total)
    dx = x - mean_x[:, None]
    sxx = np.maximum((dx**2) @ w, 1e-300)
    A = np.maximum((dx * (loss - mean_y)) @ w / sxx, 0.0)  # a rising curve has no law: flat
    E = mean_y - A * mean_x
    through_zero = np.maximum((x * loss) @ w, 0.0) / np.maximum((x**2) @ w, 1e-300)
    A = np.where(E < 0, through_zero, A)
    E = np.maximum(E, 0.0)
    rss = ((loss - E[:, None] - A[:, None] * x) ** 2) @ w
    # The weights are choices, not inverse variances, so the covariance is the sandwich's.
    slope = dx / sxx[:, None]  # dA / dloss_i = slope_i w_i, and d mean_y / dloss_i = w_i / total
    var_mean, var_a, cov_mean_a = np.sum(w**2) / total**2, slope**2 @ w**2, slope @ w**2 / total
    var_e = var_mean + mean_x**2 * var_a - 2 * mean_x * cov_mean_a
    return E, A, rss, np.stack([var_e, var_a, cov_mean_a - mean_x * var_a], axis=1)


def make_predictor(trigger: KappaConfig) -> Predictor:
    """The predictor that a configuration asks for. Raises `UserError` where what it needs is missing or out of
    range."""
    match trigger.predictor:
        case "fit":
            return Fit(trigger.min_evals)
        case "scaling_law":
            return FromLaw(trigger.scaling_law)
        case "constant" if trigger.constant is not None:
            return Constant(trigger.constant)
        case "reference" if trigger.reference is not None:
            return Reference(trigger.reference)
    name = trigger.predictor
    raise UserError(f"growth.trigger.{name}", "(missing)", f"predictor {name} needs it", "add it")
