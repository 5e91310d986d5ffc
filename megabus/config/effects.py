"""Keys that say what nothing heeds are refused: who writes one means something by it."""

from __future__ import annotations

from megabus.config.schema import OptimizerConfig, RunConfig
from megabus.config.section import Section
from megabus.errors import UserError

# Keys of `model` that the kind of model does not read.
OTHERS = {"ngpt": ("init_std", "embed_init_std", "head_init_std", "norm_eps"), "gpt": ("alpha_init", "s_z_init")}


def check_effects(config: RunConfig) -> None:
    """Raise `UserError` about the first key that would have no effect beside the others."""
    model = config.model
    for name in OTHERS[model.kind]:
        if _given(model, name):
            problem = f"has no effect on model.kind = {model.kind}"
            raise UserError(f"model.{name}", getattr(model, name), problem, "leave it out")
    _check_fall(config.optimizer)
    if config.growth.stages:
        _check_trigger(config)


def _check_fall(optim: OptimizerConfig) -> None:
    schedule, logarithmic = optim.schedule, optim.schedule == "log" or optim.decay == "log"
    falls = schedule in ("cosine", "log") or (schedule == "wsd" and optim.decay_share > 0)
    if optim.decay != "linear" and schedule != "wsd":
        problem = f"is the course of wsd's fall, and optimizer.schedule is {schedule}"
        raise UserError("optimizer.decay", optim.decay, problem, "leave it out, or set optimizer.schedule to wsd")
    if optim.decay != "linear" and not falls:
        problem = "is the course of wsd's fall, and optimizer.decay_share is 0"
        raise UserError("optimizer.decay", optim.decay, problem, "leave it out, or raise decay_share")
    if schedule != "wsd" and _given(optim, "decay_share"):
        problem = f"is the share of wsd's fall, and optimizer.schedule is {schedule}"
        raise UserError(
            "optimizer.decay_share", optim.decay_share, problem, "leave it out, or set optimizer.schedule to wsd"
        )
    if not (falls and logarithmic) and _given(optim, "decay_rho"):
        remedy = "leave it out, or set optimizer.schedule or decay to log"
        raise UserError("optimizer.decay_rho", optim.decay_rho, "is of a logarithmic fall, and there is none", remedy)
    if optim.min_lr_ratio > 0 and not falls:
        problem = "is where a fall ends, and there is none"
        raise UserError("optimizer.min_lr_ratio", optim.min_lr_ratio, problem, "leave it out, or let lr fall")
    if schedule in ("cosine", "log") and optim.warmup_share == 1:
        problem = f"leaves nothing of the budget for the fall of optimizer.schedule = {schedule}"
        raise UserError("optimizer.warmup_share", optim.warmup_share, problem, "lower it, or set schedule to constant")


def _check_trigger(config: RunConfig) -> None:
    trigger = config.growth.trigger
    for name in ("constant", "reference"):
        value = getattr(trigger, name)
        if value is not None and trigger.predictor != name:
            problem = f"is of predictor {name}, and growth.trigger.predictor is {trigger.predictor}"
            raise UserError(f"growth.trigger.{name}", value, problem, f"remove it, or set predictor to {name}")
    if trigger.rule != "marginal":
        return
    asked = [("growth.trigger.kappa", trigger.kappa if _given(trigger, "kappa") else None)]
    asked += [(f"growth.stages.{number}.kappa", stage.kappa) for number, stage in enumerate(config.growth.stages)]
    for key, kappa in asked:
        if kappa is not None:
            problem = "is not asked for by growth.trigger.rule = marginal"
            raise UserError(key, kappa, problem, "remove it, or set rule to kappa")


def _given(section: Section, name: str) -> bool:
    """Whether a key says anything: a configuration that was saved has all keys."""
    said: bool = getattr(section, name) != type(section).model_fields[name].default
    return said
