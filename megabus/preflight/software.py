"""Whether the kernels and the optimizer that the configuration asks for run here."""

from __future__ import annotations

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from megabus.config import RunConfig, Stage
from megabus.config.stages import stage_section
from megabus.engine.adam import make_adam
from megabus.errors import UserError, say
from megabus.kernels.choice import select, why_not_wide


def check_software(config: RunConfig) -> None:
    """Raise `UserError` where the kernels or the optimizer cannot run here, before anything is written."""
    device = torch.device(get_accelerator().device_name())
    select(config.train.kernels, device)
    if config.optimizer.implementation == "torch":
        return
    if dist.get_rank() == 0 and config.optimizer.implementation == "deepspeed":
        say("building DeepSpeed's Adam, if it has not been built yet: a minute or more")
    make_adam(config.optimizer, [{"params": [torch.nn.Parameter(torch.zeros(8, device=device))]}], device)


def check_kernels(config: RunConfig, stages: list[Stage]) -> None:
    """Raise `UserError` where a stage is too wide for the kernels: else a run would find out after it has grown."""
    for stage in stages:
        model = stage.model
        rows = {"d_model": (model.d_model,), "n_heads": (model.n_heads // stage.layout.tp, model.head_dim)}
        for name, axes in rows.items():
            problem = why_not_wide(config.train.kernels, *axes)
            if problem is not None:
                problem = f"makes {problem}, the most that train.kernels = {config.train.kernels} holds"
                key = f"{stage_section(stage.index)}.{name}"
                raise UserError(key, getattr(model, name), problem, "set train.kernels to compiled or eager")
