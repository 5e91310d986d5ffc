"""When to grow: rank 0 watches the validation loss until the share κ of its improvement is extracted.

The mission's formula reads `tp·κ + mp` with tp = final − start and final = mp, the predicted final loss.
Taken literally it falls below zero (start 10, mp 2, κ 0.8: −6.4 + 2 = −4.4), where no loss ever gets: tp is
a change, so it belongs to the loss it changes. Read as start + κ·tp it is

    target = start + κ·(mp − start) = mp + (1 − κ)·(start − mp)

κ = 0 is the start and κ = 1 the predicted end, for any losses. start is the first finite validation loss
seen in the stage; growth keeps the function, so in grown stages that is about what the last size ended with.
κ is ill-conditioned near 1, where an error in mp as large as (1 − κ)·(start − mp) makes the target
unreachable: hence `max_std`, the logged slope d log L / d log C, and a cap on every stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from megabus.errors import UserError
from megabus.kappa.predictors import CurvePoint, Fit, Predictor, StageSpan

Reason = Literal["kappa", "cap"]

_SLOPE_POINTS = 5


@dataclass(frozen=True)
class KappaSettings:
    """How to judge a stage. Losses in nats per token.

    smoothing: coefficient β of the bias-corrected EMA over validation losses; 0 = none.
    patience: evaluations in a row that must meet the target; min_evals: evaluations before κ may trigger.
    start: the first validation loss of the `stage`, or of the whole `run`.
    max_std: largest std of mp, as a share of start − mp, on which κ acts; a vaguer prediction only informs.
    """

    kappa: float = 0.95
    predictor: Predictor = field(default_factory=Fit)
    smoothing: float = 0.0
    patience: int = 1
    min_evals: int = 3
    start: Literal["stage", "run"] = "stage"
    max_std: float = 0.25

    def __post_init__(self) -> None:
        _check(0 <= self.kappa <= 1, "kappa", self.kappa, "a share from 0 to 1")
        _check(0 <= self.smoothing < 1, "smoothing", self.smoothing, "at least 0 and below 1")
        _check(self.patience >= 1, "patience", self.patience, "1 or more")
        _check(self.min_evals >= 1, "min_evals", self.min_evals, "1 or more")
        _check(self.start in ("stage", "run"), "start", self.start, "`stage` or `run`")
        _check(self.max_std > 0, "max_std", self.max_std, "above 0")


def _check(ok: bool, key: str, value: object, wanted: str) -> None:
    if not ok:
        raise UserError(f"growth.trigger.{key}", value, "out of range", f"use {wanted}")


@dataclass(frozen=True)
class KappaView:
    """What κ sees now: for the log line and the metrics. None = not known (yet).

    progress: (start − smoothed) / (start − mp), at most 1, negative while worse than the start; None also
    when mp >= start, where the predictor sees nothing to gain and so no share of it exists.
    slope: d log L / d log C over the last evaluations, C the FLOPs of the run.
    """

    stage: int
    kappa: float
    start: float | None
    mp: float | None
    mp_std: float | None
    target: float | None
    smoothed: float | None
    progress: float | None
    slope: float | None
    evals: int
    met: int
    patience: int
    nonfinite: int
    stage_tokens: int
    stage_flops: float
    max_tokens: int | None
    max_flops: float | None

    def as_dict(self) -> dict[str, Any]:
        """Flat metrics: `kappa`, and every other field as `kappa_<field>`."""
        return {key if key == "kappa" else f"kappa_{key}": value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Decision:
    """Grow now, and why. `view` is set by an evaluation, None by a check of the cap alone."""

    grow: bool
    reason: Reason | None = None
    view: KappaView | None = None


@dataclass
class KappaState:
    """All that κ must remember, JSON-serialisable. The rest is a function of it, so a resume is bitwise."""

    span: StageSpan
    run_start: float | None = None
    curve: list[CurvePoint] = field(default_factory=list)
    met: int = 0
    nonfinite: int = 0


class KappaMonitor:
    """Feed it every evaluation; it says when to grow. After the growth, call `start_stage` again.

    It does not know which stage is the last one: there the caller ignores `grow`.
    """

    def __init__(self, settings: KappaSettings) -> None:
        self.settings = settings
        self._state: KappaState | None = None

    @property
    def state(self) -> KappaState:
        if self._state is None:
            raise RuntimeError("KappaMonitor.start_stage or load_state_dict must come first")
        return self._state

    def start_stage(
        self,
        stage: int,
        n_params: int,
        kappa: float | None = None,
        max_tokens: int | None = None,
        max_flops: float | None = None,
        *,
        tokens: int = 0,
        flops: float = 0.0,
    ) -> None:
        """Forget the last size and watch a new one, which begins at these run totals of tokens and FLOPs.

        kappa None = the settings'. The caps count from here; None = no cap.
        """
        kappa = self.settings.kappa if kappa is None else kappa
        _check(0 <= kappa <= 1, "kappa", kappa, "a share from 0 to 1")
        for key, cap in (("max_tokens", max_tokens), ("max_flops", max_flops)):
            if cap is not None and not cap > 0:
                raise UserError(f"growth.{key}", cap, "not a budget", "use a number above 0, or leave it out")
        span = StageSpan(stage, n_params, kappa, tokens, flops, max_tokens, max_flops)
        self._state = KappaState(span, self._state.run_start if self._state else None)

    def retarget(self, kappa: float, max_tokens: int | None, max_flops: float | None) -> None:
        """Go on watching the present stage with another kappa and other caps: those that a resumed run was given."""
        state = self.state
        state.span = replace(state.span, kappa=kappa, max_tokens=max_tokens, max_flops=max_flops)

    def observe(self, tokens: int, flops: float, loss: float, *, only_cap: bool = False) -> Decision:
        """Take one validation loss at these run totals, and decide. only_cap: κ may not trigger now.

        A NaN or infinite loss is counted, breaks the patience and touches nothing else; only the cap, which
        asks about the budget and not about the loss, can trigger beside it.
        """
        state = self.state
        finite = math.isfinite(loss)
        if finite:
            state.curve.append(CurvePoint(int(tokens), float(flops), float(loss)))
            state.run_start = float(loss) if state.run_start is None else state.run_start
        else:
            state.nonfinite += 1
        view = self.view(tokens, flops)
        state.met = state.met + 1 if finite and self._met(view) else 0
        view = replace(view, met=state.met)
        enough = state.met >= self.settings.patience and len(state.curve) >= self.settings.min_evals
        if finite and enough and not only_cap:
            return Decision(True, "kappa", view)
        cap = self.check_cap(tokens, flops)
        return Decision(cap.grow, cap.reason, view)

    def check_cap(self, tokens: int, flops: float) -> Decision:
        """Whether the stage's budget is spent at these run totals: cheap enough for every step."""
        span = self.state.span
        spent = cap_is_reached(tokens - span.tokens, flops - span.flops, span.max_tokens, span.max_flops)
        return Decision(spent, "cap" if spent else None)

    def view(self, tokens: int, flops: float) -> KappaView:
        """The state of the stage at these run totals."""
        state, span = self.state, self.state.span
        start = mp = std = target = smoothed = progress = None
        if state.curve:
            start = state.curve[0].loss
            if self.settings.start == "run" and state.run_start is not None:
                start = state.run_start
            smoothed = _ema([point.loss for point in state.curve], self.settings.smoothing)
            prediction = self.settings.predictor(span, state.curve)
            if prediction is not None:
                mp, std = prediction.loss, prediction.std
                if mp < start:
                    target = mp + (1 - span.kappa) * (start - mp)
                    progress = min(1.0, (start - smoothed) / (start - mp))
        return KappaView(
            stage=span.index,
            kappa=span.kappa,
            start=start,
            mp=mp,
            mp_std=std,
            target=target,
            smoothed=smoothed,
            progress=progress,
            slope=_log_slope(state.curve[-_SLOPE_POINTS:]),
            evals=len(state.curve),
            met=state.met,
            patience=self.settings.patience,
            nonfinite=state.nonfinite,
            stage_tokens=tokens - span.tokens,
            stage_flops=flops - span.flops,
            max_tokens=span.max_tokens,
            max_flops=span.max_flops,
        )

    def _met(self, view: KappaView) -> bool:
        if view.start is None or view.mp is None or view.smoothed is None or view.target is None:
            return False
        if view.smoothed > view.target:
            return False
        return view.mp_std is None or view.mp_std <= self.settings.max_std * (view.start - view.mp)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s answer, also after a trip through JSON."""
        curve = [CurvePoint(*point) for point in state["curve"]]
        self._state = KappaState(**{**state, "span": StageSpan(**state["span"]), "curve": curve})


def cap_is_reached(tokens: int, flops: float, max_tokens: int | None, max_flops: float | None) -> bool:
    """Whether what a stage has used meets either of its caps; None = no cap."""
    return (max_tokens is not None and tokens >= max_tokens) or (max_flops is not None and flops >= max_flops)


def _ema(losses: Sequence[float], beta: float) -> float:
    """Exponential moving average, bias-corrected: the weights of the losses seen sum to 1."""
    mean = 0.0
    for loss in losses:
        mean = beta * mean + (1 - beta) * loss
    return mean / (1 - beta ** len(losses))


def _log_slope(curve: Sequence[CurvePoint]) -> float | None:
    """Least-squares d log L / d log C of the points with C, L > 0; None below two different C."""
    points = [(math.log(p.flops), math.log(p.loss)) for p in curve if p.flops > 0 and p.loss > 0]
    if len({x for x, _ in points}) < 2:
        return None
    x, y = np.array(points).T
    x = x - x.mean()
    return float(x @ (y - y.mean()) / (x @ x))


def bar(progress: float | None, kappa: float, width: int = 10) -> str:
    """One line of text, `κ ▕██████░░|░▏ 62%/80%`: share extracted, with a mark at κ; – while unknown."""
    full = 0 if progress is None else round(min(max(progress, 0.0), 1.0) * width)
    cells = ["█"] * full + ["░"] * (width - full)
    cells[min(int(kappa * width), width - 1)] = "|"
    share = "–" if progress is None else f"{progress:.0%}"
    return f"κ ▕{''.join(cells)}▏ {share}/{kappa:.0%}"
