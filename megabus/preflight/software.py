"""Whether the kernels, the optimizer and the sinks of metrics that the configuration asks for run here."""

from __future__ import annotations

import os
from importlib import import_module

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from pydantic import ValidationError

from megabus.config import RunConfig, Stage
from megabus.config.stages import stage_section
from megabus.engine.adam import make_adam
from megabus.errors import UserError, say
from megabus.extras import SINKS, need_sink
from megabus.kernels.choice import select, why_not_wide
from megabus.model.layers import kernel_rows

NO_LOGIN = ("offline", "disabled", "dryrun")  # of WANDB_MODE


def check_software(config: RunConfig) -> None:
    """Raise `UserError` where the kernels, the optimizer or a sink of metrics cannot run here, before a run is made."""
    if dist.get_rank() == 0:  # which alone writes metrics
        check_sinks(config)
    device = torch.device(get_accelerator().device_name())
    select(config.train.kernels, device)
    if config.optimizer.implementation == "torch":
        return
    if dist.get_rank() == 0 and config.optimizer.implementation == "deepspeed":
        say("building DeepSpeed's Adam, if it has not been built yet: a minute or more")
    make_adam(config.optimizer, [{"params": [torch.nn.Parameter(torch.zeros(8, device=device))]}], device)


def check_sinks(config: RunConfig) -> None:
    """Raise `UserError` where a sink of metrics is not to be had. What is installed may still not be importable: by a
    package of another version beside it, mostly."""
    for name, module in SINKS.items():
        if getattr(config.log, name):
            remedy = need_sink(name)
            try:
                import_module(module)
            except Exception as error:
                problem = f"needs {module}, which cannot be imported ({' '.join(str(error).split())[:200]})"
                raise UserError(f"log.{name}", "true", problem, f"mend its installation, {remedy}") from error
    if config.log.wandb and config.log.wandb_mode == "online":
        _log_in()


def _log_in() -> None:
    """Into wandb, which asks for a key where there is a terminal. Raises `UserError` where its server does not know the
    user, or does not answer, and where its own settings say something else, or nothing that it can read."""
    import wandb

    mode, offline = os.environ.get("WANDB_MODE"), "set log.wandb_mode=offline"
    if mode in NO_LOGIN:
        problem = f"is not what the environment says, WANDB_MODE = {mode}, with which wandb logs nobody in"
        raise UserError("log.wandb_mode", "online", problem, f"unset WANDB_MODE, or {offline}")
    try:
        known = wandb.login(verify=True)
        problem = "nobody is logged in"
    except ValidationError as error:  # of the environment, or of wandb's own file
        first = error.errors()[0]
        setting = "_".join(map(str, first["loc"]))
        problem = f"does not start (its setting {setting} = {first['input']}: {first['msg']})"
        remedy = f"mend WANDB_{setting.upper()}, or what wandb's settings file says, or {offline}"
        raise UserError("log.wandb_mode", "online", problem, remedy) from error
    except (wandb.errors.Error, ValueError) as error:
        known, problem = False, f"does not start ({' '.join(str(error).split())})"
    if not known:
        remedy = f"log in (`wandb login`, or WANDB_API_KEY), or {offline}"
        raise UserError("log.wandb_mode", "online", problem, remedy)


def check_kernels(config: RunConfig, stages: list[Stage]) -> None:
    """Raise `UserError` where a stage is too wide for the kernels: else a run would find out after it has grown."""
    for stage in stages:
        model = stage.model
        for name, axes in kernel_rows(model, stage.layout.tp).items():
            problem = why_not_wide(config.train.kernels, *axes)
            if problem is not None:
                problem = f"makes {problem}, the most that train.kernels = {config.train.kernels} holds"
                key = f"{stage_section(stage.index)}.{name}"
                raise UserError(key, getattr(model, name), problem, "set train.kernels to compiled or eager")
