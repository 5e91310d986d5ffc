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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from megabus.config.schema import KappaConfig, ScalingLaw
from megabus.errors import UserError
from megabus.kappa.curve_fit import CurveFit, fit_curve
from megabus.kappa.marginal import Ahead


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
    last: bool = False  # it ends with the run, so there is nothing to decide
    ahead: Ahead | None = None  # what rule `marginal` must know

    def budget(self, curve: Sequence[CurvePoint]) -> tuple[float, float] | None:
        """(tokens, FLOPs) this stage may spend, inf where open; None while FLOPs per token is unknown.

        Where both caps are set the tighter one counts. One converts to the other by the FLOPs per token of
        the curve, at which the stage is taken to go on.
        """
        max_tokens = math.inf if self.max_tokens is None else float(self.max_tokens)
        max_flops = math.inf if self.max_flops is None else self.max_flops
        if math.isinf(max_tokens) and math.isinf(max_flops):
            return math.inf, math.inf
        per_token, (spent, flops) = self.flops_per_token(curve), self._before(curve)
        if per_token is None:
            return None
        tokens = min(max_tokens - spent, (max_flops - flops) / per_token)
        return spent + tokens, flops + tokens * per_token

    def flops_per_token(self, curve: Sequence[CurvePoint]) -> float | None:
        """Of the steps that the curve is of; None before there is one."""
        tokens, flops = self._before(curve)
        if not curve or (last := curve[-1]).tokens - self.tokens <= tokens or last.flops - self.flops <= flops:
            return None
        return (last.flops - self.flops - flops) / (last.tokens - self.tokens - tokens)

    def _before(self, curve: Sequence[CurvePoint]) -> tuple[int, float]:
        """Tokens and FLOPs of the stage before its curve, which has begun anew if the samples have changed: before that
        a token may have cost something else."""
        if not curve or curve[0].tokens <= self.tokens or len(curve) < 2:
            return 0, 0.0
        return curve[0].tokens - self.tokens, curve[0].flops - self.flops


@dataclass(frozen=True)
class Prediction:
    """A final loss (nats per token) and its standard deviation; std None = the predictor claims none.

    noise: std of a single validation around the stage's law, and bump: what a growth's transient adds to the loss at
    given FLOPs of the run, where the predictor can tell.
    """

    loss: float
    std: float | None = None
    noise: float = 0.0
    bump: Callable[[float], float] | None = None


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
    """A law fitted to this stage's own curve, apart from the bump that its growth has thrown up (`fit_curve`).

    mp = L at the end of the stage's budget, or the asymptote E when it has none. C counts from the start of the run,
    not of the stage: growth keeps the loss, so the curve goes on from a finite C. The law knows no decay of the
    learning rate: mp is that of the present rate. None before `min_points` evaluations at different C. The losses are
    not smoothed: after an exponential moving average with a decay of 0.9 a fit was wrong by 14 of its std instead of 1,
    because the average lags and correlates the residuals.
    """

    min_points: int

    def __post_init__(self) -> None:
        ok = self.min_points >= 5
        _require(ok, "min_evals", self.min_points, "too few for the 3 coefficients of `fit`", "use 5 or more")

    def __call__(self, stage: StageSpan, curve: Sequence[CurvePoint]) -> Prediction | None:
        budget, fit = stage.budget(curve), self.curve(stage, curve)
        if budget is None or fit is None:
            return None
        loss, std = fit.predict(stage.flops + budget[1])
        # A first stage's steep beginning is no bump but what it learns.
        return Prediction(loss, std, fit.noise, fit.bump if stage.flops > 0 else None)

    def curve(self, stage: StageSpan, curve: Sequence[CurvePoint]) -> CurveFit | None:
        """The law, None before `min_points`."""
        points = {p.flops: p.loss for p in curve if p.flops > stage.flops and math.isfinite(p.loss)}
        if len(points) < self.min_points:
            return None
        return fit_curve(np.array(list(points)), np.array(list(points.values())), stage.flops)


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
