"""Why κ has grown the model at a validation, or has not: a line for the log."""

from __future__ import annotations

from megabus.config.reasons import REASONS
from megabus.config.schema import KappaConfig
from megabus.kappa.monitor import Decision, KappaView, cap_is_reached


def why(decision: Decision, view: KappaView, trigger: KappaConfig) -> str:
    """What `decision` says, with the numbers that it comes from."""
    if decision.reason is not None:
        message = REASONS[decision.reason].met + (_figures(view) if decision.reason == "kappa" else "")
        if decision.reason == "marginal":
            message += f": {_compared(view)}"
        due = cap_is_reached(view.stage_tokens, view.stage_flops, view.max_tokens, view.max_flops)
        return message + (f", and {REASONS['cap'].met}" if due and decision.reason != "cap" else "")
    match decision.unmet:
        case "decay":
            return "κ decides nothing while the learning rate decays"
        case "finite":
            return "κ waits: the loss is not finite"
        case "min_evals":
            return f"κ waits: {view.evals} of {trigger.min_evals} evaluations (growth.trigger.min_evals)"
        case "patience":
            times = f"{view.met} of {trigger.patience} times in a row (growth.trigger.patience)"
            return f"κ is met {times}{_figures(view)}"
        case "returns":
            return _returns(view)
        case "median":
            return f"κ waits: {view.evals} evaluations, too few for a median"
        case "prediction":
            return f"κ waits: predictor {trigger.predictor} predicts nothing yet"
        case "improvement":
            return f"κ is not met: no improvement is predicted (from {view.start:.4f} to {view.mp:.4f})"
        case "target":
            return f"κ is not met{_figures(view)}"
    assert view.start is not None
    assert view.mp is not None
    most = trigger.max_std * (view.start - view.mp)
    return f"κ is met, but its prediction is too vague: {view.mp:.4f} ± {view.std:.4f}, at most ± {most:.4f} (max_std)"


def _figures(view: KappaView) -> str:
    """The loss that is compared and what it is compared with, where κ goes by them."""
    if view.flat:
        return ": next to nothing is left to be learnt"
    if view.level is None or view.target is None:
        return ""
    reached = "" if view.progress is None else f", {view.progress:.0%} of the improvement"
    return f": {view.level:.4f}{reached}; grows at {view.target:.4f}, {view.kappa:.0%}"


def _compared(view: KappaView) -> str:
    return f"{view.gain_next:.2e} nats a FLOP against {view.gain_now:.2e} of this size"


def _returns(view: KappaView) -> str:
    if view.gain_now is None or view.gain_next is None:
        return "the next size's return is not known yet"
    returns = _compared(view)
    if view.gain_next < view.gain_now:
        return f"the next size gives less: {returns}"
    return f"the next size gives more, but too vaguely (max_std) or too late to make up for healing: {returns}"
