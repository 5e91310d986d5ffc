"""When to grow: once a stage has achieved a fraction κ of its predicted loss improvement.

The formula read here: growth is due at the first validation loss at or below

    target = start + κ·(mp − start) = mp + (1 − κ)·(start − mp)

start is the median of the stage's first three finite validation losses (growth keeps the function, so in a grown stage
that is about what the last size ended with), and mp the loss that the stage is predicted to end with. What is held
against the target is the median of the last three. So no single validation, first, last or between, however far off,
grows the model, nor do several of which no two are among three in a row; and κ decides from the third on. κ = 0 is the
start and κ = 1 the predicted end, whatever the losses. While a grown model heals, `fit` knows how far the first losses
are above its law, and start is without that.

A curve that is flat has nothing to achieve a share of. It has ended: from half of the stage's cap on the model grows
if the improvement of the whole stage, and two std more, is at most `FLAT` of the loss.

Its source, the method's original description, writes tp·κ + mp with tp = final − start and final = mp. Taken literally
that is no loss: from a start of 10 to an mp of 2, κ = 0.8 gives −6.4 + 2 = −4.4. tp is a change, so it must be added to
the loss that changes, which is start.

Near κ = 1 the target is sensitive to mp: an error as large as (1 − κ)·(start − mp) puts it out of reach. Hence
`max_std`, a cap on every stage, and the logged slope d log L / d log C.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from megabus.config.reasons import Reason
from megabus.config.schema import KappaConfig
from megabus.kappa.curve_fit import CurveFit
from megabus.kappa.marginal import Returns, StagePath, path_of, returns
from megabus.kappa.predictors import CurvePoint, Fit, StageSpan, make_predictor

# What κ may wait for, in the order in which it is asked: that the rate does not decay, a finite loss, min_evals,
# patience. Rule kappa: losses for a median, a prediction, one of an improvement, the target, and one that is certain
# enough. Rule marginal: that the next size gives more.
Unmet = Literal[
    "decay", "finite", "min_evals", "patience", "median", "prediction", "improvement", "target", "max_std", "returns"
]

FLAT = 0.01
_SLOPE_POINTS = 5
_OF = 3  # losses, of which the median counts
BAR_CELLS = 10


@dataclass(frozen=True)
class KappaView:
    """What κ is judged by, for the log and the metrics. None = not known (yet).

    noise: std of a single validation, where the predictor tells. loss: the newest finite one. level: the median of the
    last three. progress: (start − level) / (start − mp), at most 1 and negative while worse than the start; None too
    when mp >= start, where no improvement is predicted that there could be a share of. flat: whether that is so of a
    curve that is known well, which then grows. gain_now, gain_next: nats per FLOP of this size and of the next, by
    rule `marginal`; then progress is the second over the first, kappa 1, and nothing else is predicted. slope:
    d log L / d log C over the last evaluations, C the FLOPs of the run.
    """

    stage: int
    kappa: float
    start: float | None
    mp: float | None
    mp_std: float | None
    noise: float
    target: float | None
    loss: float | None
    level: float | None
    progress: float | None
    flat: bool
    gain_now: float | None
    gain_next: float | None
    slope: float | None
    evals: int
    met: int
    patience: int
    nonfinite: int
    stage_tokens: int
    stage_flops: float
    max_tokens: int | None
    max_flops: float | None

    @property
    def std(self) -> float:
        """Of the predicted loss: two medians of three, each with half of a validation's variance, stand beside mp."""
        return 0.0 if self.mp_std is None else math.hypot(self.mp_std, self.noise)

    def as_dict(self) -> dict[str, Any]:
        """Flat metrics: `kappa`, and every other field as `kappa_<field>`."""
        return {key if key == "kappa" else f"kappa_{key}": value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Decision:
    """Grow now, and why; else the first condition for it that is not met. view: None in the last stage."""

    grow: bool
    reason: Reason | None = None
    view: KappaView | None = None
    unmet: Unmet | None = None


@dataclass
class KappaState:
    """All that κ must remember, as JSON can hold it. All else is computed from it, so a resumed run decides the
    same."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    span: StageSpan
    curve: list[CurvePoint] = field(default_factory=list)
    met: int = 0
    nonfinite: int = 0
    past: list[StagePath] = field(default_factory=list)  # the stages before, for rule `marginal`


SAVED: TypeAdapter[KappaState] = TypeAdapter(KappaState)  # reads it from JSON


def check_saved(state: KappaState) -> None:
    """Raise ValueError, the key first, for a state whose types are right and that no monitor was ever in."""
    span, curve = state.span, state.curve
    wrongs = {
        "span.index": span.index < 0,
        "span.n_params": not 0 < span.n_params < 2**63,
        "span.kappa": not 0 <= span.kappa <= 1,
        "span.tokens": not 0 <= span.tokens < 2**63,
        "span.flops": span.flops < 0,
        "span.max_tokens": span.max_tokens is not None and span.max_tokens <= 0,
        "span.max_flops": span.max_flops is not None and span.max_flops <= 0,
        "curve": list(curve) != sorted(curve, key=lambda point: (point.tokens, point.flops)),
        "curve.0": bool(curve) and (curve[0].tokens < span.tokens or curve[0].flops < span.flops),
        "curve: a number of FLOPs": any(before.flops > after.flops for before, after in itertools.pairwise(curve)),
        "curve: a loss": any(point.loss < 0 for point in curve),
        "met": state.met < 0,
        "nonfinite": state.nonfinite < 0,
    }
    if span.ahead is not None:
        wrongs |= {f"span.ahead.{key}": wrong for key, wrong in span.ahead.wrongs().items()}
    for number, path in enumerate(state.past):
        wrongs |= {f"past.{number}.{key}": wrong for key, wrong in path.wrongs().items()}
    for key, wrong in wrongs.items():
        if wrong:
            raise ValueError(f"{key}: is out of range or out of order")


class KappaMonitor:
    """Told of every validation loss, it says when to grow. Call `start_stage` first, and after every growth.

    κ itself comes with the stage, not from `trigger`. In the last stage (`StageSpan.last`) there is nothing to decide:
    the losses are remembered, since a resumed run may be given another stage, and nothing is predicted.
    Raises `UserError` for a predictor that `trigger` does not give what it needs.
    """

    def __init__(self, trigger: KappaConfig) -> None:
        self.trigger, self.predictor = trigger, make_predictor(trigger)
        self._marginal = Fit(trigger.min_evals) if trigger.rule == "marginal" else None
        self._state: KappaState | None = None

    @property
    def state(self) -> KappaState:
        if self._state is None:
            raise RuntimeError("KappaMonitor.start_stage or load_state_dict must come first")
        return self._state

    def start_stage(self, span: StageSpan) -> None:
        """Watch this stage. Of the last one stays what a law of this run's stages can be fitted to."""
        found = None if self._state is None else self._fitted()
        past = [] if self._state is None else [*self._state.past, *([] if found is None else [found[1]])]
        self._state = KappaState(span, past=past)

    def begin_anew(self) -> None:
        """Forget the stage's losses: those that come follow another law."""
        self.state.curve.clear()
        self.state.met = 0

    def retarget(self, span: StageSpan) -> None:
        """Watch the present stage with what a resumed run was given: κ, caps, what is ahead. Where it began stays."""
        state = self.state
        state.span = replace(span, index=state.span.index, tokens=state.span.tokens, flops=state.span.flops)

    def observe(self, tokens: int, flops: float, loss: float, *, only_cap: bool = False) -> Decision:
        """Take one validation loss at these run totals, and decide. only_cap: κ may not trigger now.

        A NaN or infinite loss is counted and starts `patience` anew; it changes nothing else. Then only the cap can
        trigger, since that looks at the budget and not at the loss.
        """
        state = self.state
        finite = math.isfinite(loss)
        if finite:
            state.curve.append(CurvePoint(int(tokens), float(flops), float(loss)))
        else:
            state.nonfinite += 1
        view = self.view(tokens, flops)
        if view is None:
            return Decision(False)
        returned = self._returns(tokens, flops) if finite else None
        if self._marginal is not None:
            view = _with_returns(view, returned)
            unmet: Unmet | None = "returns"
            if returned is not None and returned.grow(self.trigger.max_std):
                unmet = None
        else:
            unmet = self._unmet(view)
        met = unmet is None
        state.met = state.met + 1 if finite and met else 0
        view = replace(view, met=state.met)
        enough = state.met >= self.trigger.patience and len(state.curve) >= self.trigger.min_evals
        if finite and enough and not only_cap:
            return Decision(True, self.trigger.rule, view)
        if cap_is_reached(view.stage_tokens, view.stage_flops, view.max_tokens, view.max_flops):
            return Decision(True, "cap", view)
        earlier: tuple[tuple[bool, Unmet], ...] = (
            (only_cap, "decay"),
            (not finite, "finite"),
            (len(state.curve) < self.trigger.min_evals, "min_evals"),
            (met, "patience"),
        )
        return Decision(False, None, view, next((word for holds, word in earlier if holds), unmet))

    def view(self, tokens: int, flops: float) -> KappaView | None:
        """The state of the stage at these run totals; None in the last one."""
        state, span = self.state, self.state.span
        if span.last:
            return None
        start = mp = std = target = loss = level = progress = None
        noise = 0.0
        flat = False
        if state.curve:
            prediction = None if self._marginal is not None else self.predictor(span, state.curve)
            bump = None if prediction is None else prediction.bump
            first = state.curve[:_OF]
            start = float(np.median([p.loss - (0.0 if bump is None else bump(p.flops)) for p in first]))
            level = float(np.median([p.loss for p in state.curve[-_OF:]]))
            loss = state.curve[-1].loss
            if prediction is not None:
                mp, std, noise = prediction.loss, prediction.std, prediction.noise
                if mp < start:
                    target = mp + (1 - span.kappa) * (start - mp)
                    progress = min(1.0, (start - level) / (start - mp))
                half = cap_share(tokens - span.tokens, flops - span.flops, span.max_tokens, span.max_flops) >= 0.5
                flat = half and std is not None and start - mp + 2 * std <= FLAT * level
        return KappaView(
            stage=span.index,
            kappa=span.kappa,
            start=start,
            mp=mp,
            mp_std=std,
            noise=noise,
            target=target,
            loss=loss,
            level=level,
            progress=progress,
            flat=flat,
            gain_now=None,
            gain_next=None,
            slope=_log_slope(state.curve[-_SLOPE_POINTS:]),
            evals=len(state.curve),
            met=state.met,
            patience=self.trigger.patience,
            nonfinite=state.nonfinite,
            stage_tokens=tokens - span.tokens,
            stage_flops=flops - span.flops,
            max_tokens=span.max_tokens,
            max_flops=span.max_flops,
        )

    def _unmet(self, view: KappaView) -> Unmet | None:
        if view.evals < _OF:
            return "median"
        if view.start is None or view.mp is None or view.level is None:
            return "prediction"
        if view.flat:
            return None
        if view.target is None:
            return "improvement"
        if view.level > view.target:
            return "target"
        return None if view.std <= self.trigger.max_std * (view.start - view.mp) else "max_std"

    def _fitted(self) -> tuple[CurveFit, StagePath, float] | None:
        """For rule `marginal`: the fit of the present stage, what the stage has shown, and its FLOPs per token; None
        while that is too little for a fit."""
        span = self.state.span
        fit = None if self._marginal is None else self._marginal.curve(span, self.state.curve)
        if fit is None:
            return None
        points = [p for p in self.state.curve if p.flops > span.flops]
        tokens, losses = np.array([p.tokens - span.tokens for p in points]), np.array([p.loss for p in points])
        flops_per_token = span.flops_per_token(self.state.curve)
        assert flops_per_token is not None, "there is a fit"
        return fit, path_of(fit, span.n_params, tokens, losses, flops_per_token), flops_per_token

    def _returns(self, tokens: int, flops: float) -> Returns | None:
        state, found = self.state, None if self.state.span.ahead is None else self._fitted()
        if found is None or state.span.ahead is None:
            return None
        fit, path, flops_per_token = found
        paths = [*state.past, path]
        return returns(fit, paths, self.trigger.scaling_law, state.span.ahead, (tokens, flops), flops_per_token)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s answer, also after a trip through JSON."""
        self._state = SAVED.validate_json(json.dumps(state), strict=True)


def never_met(view: KappaView, loss: float, predictor: str) -> str | None:
    """What to tell of a stage that κ cannot end as far as its third finite loss shows, once: when that, `loss`, has
    come; None of any other."""
    if not math.isfinite(loss) or view.evals != _OF:
        return None
    if view.mp is None or view.start is None or view.mp_std is not None or view.mp < view.start:
        return None
    ends = "nothing but the run's end ends it" if view.max_tokens is view.max_flops is None else "its cap alone ends it"
    said = f"growth.trigger.predictor = {predictor} says {view.mp:.4f}, no less than where stage {view.stage} began"
    return f"{said}, {view.start:.4f}: {ends}; correct what it is given, or use fit"


def _with_returns(view: KappaView, found: Returns | None) -> KappaView:
    if found is None:
        return replace(view, kappa=1.0)
    share = found.following / found.now if found.now > 0 else None
    progress = None if share is None else min(1.0, share)
    return replace(view, kappa=1.0, progress=progress, gain_now=found.now, gain_next=found.following)


def cap_share(tokens: int, flops: float, max_tokens: int | None, max_flops: float | None) -> float:
    """What a stage has used of the cap that it comes to first; 0 without any."""
    return max(0.0 if max_tokens is None else tokens / max_tokens, 0.0 if max_flops is None else flops / max_flops)


def cap_is_reached(tokens: int, flops: float, max_tokens: int | None, max_flops: float | None) -> bool:
    """Whether what a stage has used meets either of its caps; None = no cap."""
    return (max_tokens is not None and tokens >= max_tokens) or (max_flops is not None and flops >= max_flops)


def _log_slope(curve: Sequence[CurvePoint]) -> float | None:
    """Least-squares d log L / d log C of the points with C, L > 0; None below two different C."""
    points = [(math.log(p.flops), math.log(p.loss)) for p in curve if p.flops > 0 and p.loss > 0]
    if len({x for x, _ in points}) < 2:
        return None
    x, y = np.array(points).T
    x = x - x.mean()
    return float(x @ (y - y.mean()) / (x @ x))


def bar(progress: float, kappa: float) -> str:
    """One line of text, `κ ▕██████░░|░▏ 62%/80%`: the fraction achieved, with a mark at κ."""
    full = round(min(max(progress, 0.0), 1.0) * BAR_CELLS)
    cells = ["█"] * full + ["░"] * (BAR_CELLS - full)
    cells[min(int(kappa * BAR_CELLS), BAR_CELLS - 1)] = "|"
    return f"κ ▕{''.join(cells)}▏ {progress:.0%}/{kappa:.0%}"
