"""Keys that say what nothing heeds: refused where they contradict another, told where another silences them."""

from __future__ import annotations

from megabus.config.schema import OptimizerConfig, RunConfig
from megabus.config.section import Section
from megabus.errors import UserError

# Keys of `model` that the kind of model does not read.
OTHERS = {"ngpt": ("init_std", "embed_init_std", "head_init_std", "norm_eps"), "gpt": ("alpha_init", "s_z_init")}


def check_effects(config: RunConfig) -> None:
    """Raise `UserError` about the first key that nobody can mean beside the others."""
    _check_fall(config.optimizer)
    if config.growth.stages and config.growth.trigger.rule == "marginal":
        _check_marginal(config)


def unheeded(config: RunConfig) -> list[str]:
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


def _check_fall(optim: OptimizerConfig) -> None:
    schedule = optim.schedule
    if optim.decay != "linear" and schedule != "wsd":
        problem = f"is the course of wsd's fall, and optimizer.schedule is {schedule}"
        raise UserError("optimizer.decay", optim.decay, problem, "leave it out, or set optimizer.schedule to wsd")
    if optim.decay != "linear" and not _falls(optim):
        problem = "is the course of wsd's fall, and optimizer.decay_share is 0"
        raise UserError("optimizer.decay", optim.decay, problem, "leave it out, or raise decay_share")
    if schedule != "log" and optim.decay != "log" and _given(optim, "decay_rho"):
        remedy = "leave it out, or set optimizer.schedule or decay to log"
        raise UserError("optimizer.decay_rho", optim.decay_rho, "is of a logarithmic fall, and there is none", remedy)
    if schedule in ("cosine", "log") and optim.warmup_share == 1:
        problem = f"leaves nothing of the budget for the fall of optimizer.schedule = {schedule}"
        raise UserError("optimizer.warmup_share", optim.warmup_share, problem, "lower it, or set schedule to constant")


def _check_marginal(config: RunConfig) -> None:
    trigger = config.growth.trigger
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
