"""`train.kernels: auto` of a run on GPUs: settled once for all ranks and stages, and what a resume makes of it."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator

from megabus.checkpoint.contents import Found
from megabus.config import RunConfig, Stage
from megabus.engine.forms import agreed_form
from megabus.errors import UserError
from megabus.kernels.choice import Choice
from megabus.model.layers import kernel_rows


def settle_kernels(config: RunConfig, stages: list[Stage], found: Found | None) -> tuple[RunConfig, list[str]]:
    """The configuration with the form that the run computes with, which its checkpoints then tell, and a line where the
    checkpoint that it goes on from was computed with another. Collective.

    A deterministic run keeps to the form that it has; raises `UserError` where `auto` would now take a lesser one.
    """
    train, device = config.train, torch.device(get_accelerator().device_name())
    form = agreed_form(train.kernels, device, rows_of(stages))
    messages: list[str] = []
    was = None if found is None else _form(found.state.config["train"].get("kernels", "auto"))
    if found is not None and was is not None and was != _form(form):
        if train.deterministic and train.kernels == "auto" and device.type == "cuda":
            if was != "eager":
                problem = f"stands for {form} on these GPUs now, and {found.folder} was computed with {was}, which has "
                problem += "other bits (train.deterministic)"
                remedy = f"set it to {form} if other bits will do, or to {was}"
                raise UserError("train.kernels", "auto", problem, remedy)
            form = "eager"
            messages = ["train.kernels: auto stays eager, as the run is deterministic and began so"]
        else:
            messages = [f"train.kernels: {was} -> {_form(form)}, which rounds otherwise"]
    return config.model_copy(update={"train": train.model_copy(update={"kernels": form})}), messages


def rows_of(stages: list[Stage]) -> list[tuple[int, ...]]:
    """The rows that kernels get in any of them, see `kernel_rows`."""
    return [axes for stage in stages for axes in kernel_rows(stage.model, stage.layout.tp).values()]


def _form(kernels: Choice) -> Choice:
    """auto: saved on CPUs alone, where it is eager."""
    return "eager" if kernels == "auto" else kernels
