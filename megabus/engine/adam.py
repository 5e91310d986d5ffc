"""AdamW in the implementations there are, and the one thing in which their states differ: where they count steps."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from megabus.config.schema import OptimizerConfig
from megabus.errors import UserError


class LightAdamW(torch.optim.AdamW):
    """torch's AdamW without the decorators that keep its methods out of compiled graphs: they import torch._dynamo, a
    second of every start, and megabus compiles no optimizer."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


def make_adam(config: OptimizerConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that `optimizer.implementation` asks for: torch's fused one, DeepSpeed's, or NVIDIA apex's.

    Raises `UserError` where it is not installed or cannot be built.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    options["weight_decay"] = 0.0  # each group has its own
    if config.implementation == "torch":
        return LightAdamW(groups, fused=True, **options)
    try:
        if config.implementation == "apex":
            from apex.optimizers import FusedAdam as ApexAdam  # the registry's `apex` is another package without it

            return ApexAdam(groups, adam_w_mode=True, **options)
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

        if device.type == "cpu":
            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        return FusedAdam(groups, adam_w_mode=True, **options)
    except Exception as error:  # a missing package, compiler or CUDA toolkit, each in its own way
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        problem = f"cannot be used here ({what})"
        raise UserError("optimizer.implementation", config.implementation, problem, "use torch") from error


def read_step(optimizer: torch.optim.Optimizer, flat: Tensor) -> int:
    """Updates that Adam has made of a partition."""
    state = optimizer.state.get(flat)
    if not state:
        return 0
    return int(state["step"] if "step" in state else _group_of(optimizer, flat)["step"])


def write_state(optimizer: torch.optim.Optimizer, flat: Tensor, moments: dict[str, Tensor], step: int) -> None:
    """Give a partition moments, beside those that it has, and its count of updates."""
    optimizer.state[flat] = {**optimizer.state.get(flat, {}), **moments}
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.state[flat]["step"] = torch.tensor(float(step), dtype=torch.float32, device=flat.device)
    elif type(optimizer).__module__.startswith("apex"):
        _group_of(optimizer, flat)["step"] = step
    else:
        optimizer.state[flat]["step"] = step


def _group_of(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is flat for p in group["params"]))
