"""What keys of one section, or of two, must have in common."""

from __future__ import annotations

from megabus.config.schema import ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from megabus.config.section import in_line
from megabus.errors import UserError


def check_optimizer(model: ModelConfig, optim: OptimizerConfig) -> None:
    if model.kind == "ngpt" and optim.weight_decay:
        raise UserError(
            "optimizer.weight_decay",
            optim.weight_decay,
            "ngpt's weights live on the unit sphere, where decay has no meaning",
            "set it to 0, or model.kind to gpt",
        )
    if optim.schedule == "wsd" and optim.warmup_share + optim.decay_share > 1:
        raise UserError(
            "optimizer.decay_share",
            optim.decay_share,
            f"and warmup_share {optim.warmup_share} exceed the run",
            "make them sum to 1 or less",
        )
    if optim.gate is not None and optim.implementation != "torch":
        problem = "has no gate, and optimizer.gate wants one"
        raise UserError("optimizer.implementation", optim.implementation, problem, "use torch")
    _check_transfer(model, optim)


def _check_transfer(model: ModelConfig, optim: OptimizerConfig) -> None:
    tuned = optim.transfer
    if tuned is None:
        return
    if optim.implementation != "torch":
        problem = "has one learning rate for all matrices, and optimizer.transfer wants several"
        raise UserError("optimizer.implementation", optim.implementation, problem, "use torch")
    if model.kind == "ngpt" and tuned.steps is None:
        remedy = "say with how many lr was tuned"
        raise UserError("optimizer.transfer.steps", "(missing)", "ngpt's rates follow from it", remedy)
    for name in ("n_layers", "steps"):
        value = getattr(tuned, name)
        if model.kind == "gpt" and value is not None:
            problem = "has no rule for gpt: muP is of the width alone"
            raise UserError(f"optimizer.transfer.{name}", value, problem, "leave it out, and tune lr at this one")
    if model.tie_embeddings:
        problem = "has one rate for an embedding and another for a head, and model.tie_embeddings makes them one matrix"
        raise UserError("optimizer.transfer", in_line(tuned.model_dump()), problem, "leave one of the two out")


def check_only_ngpt(model: ModelConfig, train: TrainConfig, optim: OptimizerConfig) -> None:
    """What only has a meaning where vectors are unit vectors."""
    remedy = "leave it out, or set model.kind to ngpt"
    if model.kind != "ngpt" and train.logit_power is not None:
        problem = f"preconditions by s_z, which {model.kind} has none of"
        raise UserError("train.logit_power", train.logit_power, problem, remedy)
    if model.kind != "ngpt" and optim.max_angle is not None:
        raise UserError(
            "optimizer.max_angle", optim.max_angle, f"caps what unit rows turn by: {model.kind} has none", remedy
        )


def check_settle(config: RunConfig) -> None:
    settle, kind, whole = config.growth.settle, config.model.kind, config.optimizer.max_angle
    if settle is None:
        return
    key, remedy = "growth.settle.max_angle", "leave growth.settle out, or set model.kind to ngpt"
    if kind != "ngpt":
        raise UserError(key, settle.max_angle, f"caps what unit rows turn by: {kind} has none", remedy)
    if whole is not None and settle.max_angle >= whole:
        problem = f"is not below optimizer.max_angle = {whole}, to which it is loosened"
        raise UserError(key, settle.max_angle, problem, "lower it, or leave growth.settle out")


def check_extension(config: RunConfig) -> None:
    if config.extend_vocabulary and config.data.tokenizer is None:
        remedy = "name the tokenizer that has the new pieces, or leave extend_vocabulary out"
        raise UserError("data.tokenizer", "(missing)", "extend_vocabulary = true needs it", remedy)


def check_extra(config: RunConfig) -> None:
    extra = config.eval.extra
    if not extra.tasks:
        for name in ("task_path", "metadata", "limit"):
            if value := getattr(extra, name):
                raise UserError(f"eval.extra.{name}", value, "is of tasks, and there are none", "name some as tasks")
        if extra.every is not None and not extra.data:
            raise UserError("eval.extra.every", extra.every, "measures nothing", "name data or tasks beside it")
    elif config.data.tokenizer is None:
        raise UserError("data.tokenizer", "(missing)", "eval.extra.tasks needs it", "name what made the data")


def check_trigger(config: RunConfig) -> None:
    growth, trigger = config.growth, config.growth.trigger
    if not growth.stages:
        return
    if trigger.predictor in ("constant", "reference") and getattr(trigger, trigger.predictor) is None:
        key = f"growth.trigger.{trigger.predictor}"
        raise UserError(key, "(missing)", f"predictor {trigger.predictor} needs it", "add it")
    if trigger.rule == "marginal":
        if trigger.predictor != "fit":
            problem = "predicts nothing that rule marginal asks for"
            raise UserError(
                "growth.trigger.predictor", trigger.predictor, problem, "leave it out, or set rule to kappa"
            )
        if not config.train.max_flops:
            problem = "weighs what a FLOP gives, and of a run that tokens or steps end FLOPs are no part"
            raise UserError("growth.trigger.rule", trigger.rule, problem, "set train.max_flops, or set rule to kappa")
    if isinstance(trigger.constant, list) and len(trigger.constant) != 1 + len(growth.stages):
        problem = f"has {len(trigger.constant)} losses for {1 + len(growth.stages)} stages"
        raise UserError("growth.trigger.constant", trigger.constant, problem, "give one loss, or one a stage")
    if trigger.predictor == "fit" and trigger.min_evals < 5:
        problem = "evaluations are too few to fit a power law to"
        raise UserError("growth.trigger.min_evals", trigger.min_evals, problem, "set it to 5 or more")
