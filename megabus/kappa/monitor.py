"""When to grow: once a stage has achieved a fraction κ of its predicted loss improvement.

The formula read here: growth is due at the first validation loss at or below

    target = start + κ·(mp − start) = mp + (1 − κ)·(start − mp)

start is the stage's first finite validation loss (growth keeps the function, so in a grown stage that is about what the
last size ended with), and mp the loss that the stage is predicted to end with. κ = 0 is the start and κ = 1 the
predicted end, whatever the losses.

Its source, the method's original description, writes tp·κ + mp with tp = final − start and final = mp. Taken literally
that is no loss: from a start of 10 to an mp of 2, κ = 0.8 gives −6.4 + 2 = −4.4. tp is a change, so it must be added to
the loss that changes, which is start.

Near κ = 1 the target is sensitive to mp: an error as large as (1 − κ)·(start − mp) puts it out of reach. Hence
`max_std`, a cap on every stage, and the logged slope d log L / d log C.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, TypeAdapter

from megabus.config.schema import KappaConfig
from megabus.kappa.predictors import CurvePoint, StageSpan, make_predictor

Reason = Literal["kappa", "cap"]

_SLOPE_POINTS = 5
BAR_CELLS = 10


@dataclass(frozen=True)
class KappaView:
    """What κ is judged by, for the log and the metrics. None = not known (yet).

    loss: the newest finite validation loss. progress: (start − loss) / (start − mp), at most 1 and negative while worse
    than the start; None too when mp >= start, where no improvement is predicted that there could be a share of.
    slope: d log L / d log C over the last evaluations, C the FLOPs of the run.
    """

    stage: int
    kappa: float
    start: float | None
    mp: float | None
    mp_std: float | None
    target: float | None
    loss: float | None
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
    """All that κ must remember, as JSON can hold it. All else is computed from it, so a resumed run decides the
    same."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    span: StageSpan
    curve: list[CurvePoint] = field(default_factory=list)
    met: int = 0
    nonfinite: int = 0


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
        "met": state.met < 0,
        "nonfinite": state.nonfinite < 0,
    }
    for key, wrong in wrongs.items():
        if wrong:
            raise ValueError(f"{key}: is out of range or out of order")


class KappaMonitor:
    """Told of every validation loss, it says when to grow. Call `start_stage` first, and after every growth.

    κ itself comes with the stage, not from `trigger`. The monitor does not know which stage is the last one: there the
    caller ignores `grow`. Raises `UserError` for a predictor that `trigger` does not give what it needs.
    """

    def __init__(self, trigger: KappaConfig) -> None:
        self.trigger, self.predictor = trigger, make_predictor(trigger)
        self._state: KappaState | None = None

    @property
    def state(self) -> KappaState:
        if self._state is None:
            raise RuntimeError("KappaMonitor.start_stage or load_state_dict must come first")
        return self._state

    def start_stage(self, span: StageSpan) -> None:
        """Forget the last stage and watch this one."""
        self._state = KappaState(span)

    def retarget(self, kappa: float, max_tokens: int | None, max_flops: float | None) -> None:
        """Watch the present stage with another κ and other caps: those that a resumed run was given."""
        state = self.state
        state.span = replace(state.span, kappa=kappa, max_tokens=max_tokens, max_flops=max_flops)

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
        state.met = state.met + 1 if finite and self._met(view) else 0
        view = replace(view, met=state.met)
        enough = state.met >= self.trigger.patience and len(state.curve) >= self.trigger.min_evals
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
        start = mp = std = target = loss = progress = None
        if state.curve:
            start, loss = state.curve[0].loss, state.curve[-1].loss
            prediction = self.predictor(span, state.curve)
            if prediction is not None:
                mp, std = prediction.loss, prediction.std
                if mp < start:
                    target = mp + (1 - span.kappa) * (start - mp)
                    progress = min(1.0, (start - loss) / (start - mp))
        return KappaView(
            stage=span.index,
            kappa=span.kappa,
            start=start,
            mp=mp,
            mp_std=std,
            target=target,
            loss=loss,
            progress=progress,
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

    def _met(self, view: KappaView) -> bool:
        if view.start is None or view.mp is None or view.loss is None or view.target is None:
            return False
        if view.loss > view.target:
            return False
        return view.mp_std is None or view.mp_std <= self.trigger.max_std * (view.start - view.mp)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values."""
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`'s answer, also after a trip through JSON."""
        self._state = SAVED.validate_json(json.dumps(state), strict=True)


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


def bar(progress: float | None, kappa: float) -> str:
    """One line of text, `κ ▕██████░░|░▏ 62%/80%`: the fraction achieved, with a mark at κ; – while unknown."""
    full = 0 if progress is None else round(min(max(progress, 0.0), 1.0) * BAR_CELLS)
    cells = ["█"] * full + ["░"] * (BAR_CELLS - full)
    cells[min(int(kappa * BAR_CELLS), BAR_CELLS - 1)] = "|"
    share = "–" if progress is None else f"{progress:.0%}"
    return f"κ ▕{''.join(cells)}▏ {share}/{kappa:.0%}"
