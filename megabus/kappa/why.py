"""Why κ has grown the model at a validation, or has not: a line for the log."""

from __future__ import annotations

import math

from megabus.config.reasons import REASONS
from megabus.config.schema import KappaConfig
from megabus.kappa.monitor import Decision, KappaView


def why(decision: Decision, view: KappaView, trigger: KappaConfig, only_cap: bool) -> str:
    """The first of the conditions that is not met, in the order in which the monitor asks for them.

    only_cap: the learning rate decays, so κ may not grow the model now.
    """
    if decision.reason is not None:
        return REASONS[decision.reason].met
    if only_cap:
        return "κ decides nothing while the learning rate decays"
    if view.evals < trigger.min_evals:
        return f"κ waits: {view.evals} of {trigger.min_evals} evaluations (growth.trigger.min_evals)"
    if view.met:
        return f"κ is met {view.met} of {trigger.patience} times in a row (growth.trigger.patience)"
    return _marginal(view) if trigger.rule == "marginal" else _kappa(view, trigger)


def _kappa(view: KappaView, trigger: KappaConfig) -> str:
    if view.mp is None or view.start is None or view.level is None:
        return f"κ waits: predictor {trigger.predictor} predicts nothing yet"
    if view.target is None:
        return f"κ is not met: no improvement is predicted (from {view.start:.4f} to {view.mp:.4f})"
    if view.level > view.target:
        reached = "" if view.progress is None else f", {view.progress:.0%} of the improvement"
        return f"κ is not met: {view.level:.4f}{reached}; grows at {view.target:.4f}, {view.kappa:.0%}"
    std, most = math.hypot(view.mp_std or 0.0, view.noise), trigger.max_std * (view.start - view.mp)
    return f"κ is met, but its prediction is too vague: {view.mp:.4f} ± {std:.4f}, at most ± {most:.4f} (max_std)"


def _marginal(view: KappaView) -> str:
    if view.gain_now is None or view.gain_next is None:
        return "the next size's return is not known yet"
    returns = f"{view.gain_next:.2e} nats a FLOP against {view.gain_now:.2e} of this size"
    if view.gain_next <= view.gain_now:
        return f"the next size gives less: {returns}"
    return f"the next size gives more, but too vaguely (max_std) or too late to make up for healing: {returns}"
