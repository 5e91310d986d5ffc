"""Keys that have no effect: refused where they contradict another, a warning where another makes them idle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from megabus.config.model import INITIAL
from megabus.config.schema import OptimizerConfig, RunConfig
from megabus.config.section import Section
from megabus.errors import UserError

# Keys of `model` that the kind of model does not read.
OTHERS = {"ngpt": (*INITIAL["gpt"], "norm_eps"), "gpt": INITIAL["ngpt"]}


class Idle(NamedTuple):
    """A key with which a run does what it would do without: how that is refused, and the value that does the same."""

    error: UserError
    key: str
    same: Any


def check_effects(config: RunConfig) -> None:
    """Raise `UserError` about the first key that nobody can mean beside the others."""
    for idle in _idle(config):
        raise idle.error


def without_effect(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> the value that does the same, of all keys that `check_effects` refuses: a run that was saved with
    them goes on unchanged without."""
    return {idle.key: idle.same for idle in _idle(config)}


def _idle(config: RunConfig) -> Iterator[Idle]:
    if config.extend_vocabulary and config.init_from is None:
        problem = "is of weights that a run begins with, and init_from names none"
        error = UserError("extend_vocabulary", True, problem, "name them, or leave it out")
        yield Idle(error, "extend_vocabulary", False)
    yield from _of_fall(config.optimizer)
    if config.growth.stages and config.growth.trigger.rule == "marginal":
        yield from _of_marginal(config)


def keys_without_effect(config: RunConfig) -> list[str]:
    """A line for each key that has no effect, because another has been chosen: a file is often tried with other values
    of one key, such as `optimizer.schedule`."""
    model, optim, trigger = config.model, config.optimizer, config.growth.trigger
    found: list[tuple[str, object, str]] = []
    for name in OTHERS[model.kind]:
        if _given(model, name):
            found.append((f"model.{name}", getattr(model, name), f"model.kind = {model.kind}"))
    if optim.schedule != "wsd" and _given(optim, "decay_share"):
        found.append(("optimizer.decay_share", optim.decay_share, f"optimizer.schedule = {optim.schedule}"))
    if optim.min_lr_ratio > 0 and not _falls(optim):
        found.append(("optimizer.min_lr_ratio", optim.min_lr_ratio, "a learning rate that does not fall"))
    for name in ("constant", "reference"):
        if trigger.predictor != name and (value := getattr(trigger, name)) is not None:
            found.append((f"growth.trigger.{name}", value, f"growth.trigger.predictor = {trigger.predictor}"))
    return [str(UserError(key, value, f"has no effect with {other}", "leave it out")) for key, value, other in found]


def _falls(optim: OptimizerConfig) -> bool:
    return optim.schedule in ("cosine", "log") or (optim.schedule == "wsd" and optim.decay_share > 0)


def _of_fall(optim: OptimizerConfig) -> Iterator[Idle]:
    schedule = optim.schedule
    if optim.decay != "linear" and schedule != "wsd":
        problem = f"is the course of wsd's fall, and optimizer.schedule is {schedule}"
        error = UserError("optimizer.decay", optim.decay, problem, "leave it out, or set optimizer.schedule to wsd")
        yield Idle(error, "optimizer.decay", "linear")
    elif optim.decay != "linear" and not _falls(optim):
        problem = "is the course of wsd's fall, and optimizer.decay_share is 0"
        error = UserError("optimizer.decay", optim.decay, problem, "leave it out, or raise decay_share")
        yield Idle(error, "optimizer.decay", "linear")
    falls_so = schedule == "log" or (schedule == "wsd" and optim.decay == "log" and _falls(optim))
    if not falls_so and _given(optim, "decay_rho"):
        remedy = "leave it out, or set optimizer.schedule or decay to log"
        problem = "is of a logarithmic fall, and there is none"
        error = UserError("optimizer.decay_rho", optim.decay_rho, problem, remedy)
        yield Idle(error, "optimizer.decay_rho", _default(optim, "decay_rho"))
    if schedule in ("cosine", "log") and optim.warmup_share == 1:
        problem = f"leaves nothing of the budget for the fall of optimizer.schedule = {schedule}"
        remedy = "lower it, or set schedule to constant"
        error = UserError("optimizer.warmup_share", optim.warmup_share, problem, remedy)
        yield Idle(error, "optimizer.schedule", "constant")


def _of_marginal(config: RunConfig) -> Iterator[Idle]:
    trigger = config.growth.trigger
    asked = [("growth.trigger.kappa", trigger.kappa if _given(trigger, "kappa") else None, _default(trigger, "kappa"))]
    asked += [(f"growth.stages.{number}.kappa", stage.kappa, None) for number, stage in enumerate(config.growth.stages)]
    for key, kappa, same in asked:
        if kappa is not None:
            problem = "is not asked for by growth.trigger.rule = marginal"
            yield Idle(UserError(key, kappa, problem, "remove it, or set rule to kappa"), key, same)


def _given(section: Section, name: str) -> bool:
    """Whether a key says anything: a configuration that was saved has all keys."""
    said: bool = getattr(section, name) != _default(section, name)
    return said


def _default(section: Section, name: str) -> Any:
    return type(section).model_fields[name].default
