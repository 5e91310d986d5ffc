"""AdamW in the implementations there are, and the one thing in which their states differ: where they count steps."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megabus.config.schema import OptimizerConfig
from megabus.errors import UserError
from megabus.parallel.fragments import MOMENTS

TINY = 1e-20  # nothing beside any gradient whose square fp32 can hold
BLOCK = 1 << 20  # entries that a step is computed for at a time, where it takes temporaries


class Segment(NamedTuple):
    """Entries [start, stop) of a flat partition, whose learning rate is `rate` times the group's."""

    start: int
    stop: int
    rate: float


class SegmentedAdamW(torch.optim.AdamW):
    """torch's fused AdamW with learning rates that differ along a flat partition, as its group's `segments` say; where
    there are none, all of it has the group's.

    `weight_decay` is per lr of the group, whatever a segment's rate: what decays does not depend on a model's width, as
    in Dey et al. 2025 (CompleteP, arXiv 2505.01618), table 1.
    torch's decorators keep an optimizer's methods out of compiled graphs. They import torch._dynamo, a second of every
    start, and megabus compiles no optimizer: so its methods are here without them.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self._step_partition(group, flat)

    def _step_partition(self, group: dict[str, Any], flat: Tensor) -> None:
        if not self.state.get(flat):
            write_state(self, flat, {kind: torch.zeros_like(flat) for kind in MOMENTS}, 0)
        state = self.state[flat]
        tensors = (flat, flat.grad, *(state[kind] for kind in MOMENTS))
        by_rate: dict[float, list[slice]] = {}
        for start, stop, rate in group.get("segments") or [Segment(0, flat.numel(), 1.0)]:
            by_rate.setdefault(rate, []).append(slice(start, stop))
        for rate, parts in by_rate.items():
            steps = list(state["step"].repeat(len(parts)).unbind())  # each is counted on in place
            self._update(group, rate, [[tensor[part] for part in parts] for tensor in tensors], steps)
        state["step"] += 1

    def _update(self, group: dict[str, Any], rate: float, parts: list[list[Tensor]], steps: list[Tensor]) -> None:
        """One step of segments that share a rate. parts: their weights, gradients and both moments; steps: made before
        this one, of each."""
        (params, grads, exp_avgs, exp_avg_sqs), (beta1, beta2) = parts, group["betas"]
        adamw(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"] * rate,
            weight_decay=group["weight_decay"] / rate,
            eps=group["eps"],
        )


class GatedAdamW(SegmentedAdamW):
    """AdamW whose steps m / d are gated by sigmoid(a log(d / eps)), a = `gate`, entry by entry ("Training nGPT",
    arXiv 2608.01284).

    d is the root of the bias-corrected second moment. In AdamW eps is such a gate already: m / (d + eps) = (m / d)
    sigmoid(log(d / eps)), which is a = 1. A smaller a opens and closes more slowly: the step is
    m / (d + eps^a d^(1 - a)), half of m / d where d = eps, 0.91 of it at d = 100 eps for a = 1/2 (0.99 for AdamW). So
    `eps` is where the gate is half open, and says which gradients are small: at 1e-8 few are. What is added to d
    against a division by 0 is TINY, whatever eps is. The paper has d entry by entry too; its additional factor of all
    steps, alpha, is lr's here.
    """

    def __init__(self, groups: list[dict[str, Any]], gate: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.gate = gate

    def _update(self, group: dict[str, Any], rate: float, parts: list[list[Tensor]], steps: list[Tensor]) -> None:
        (beta1, beta2), eps, keep = group["betas"], group["eps"], 1 - group["lr"] * group["weight_decay"]
        for *tensors, step in zip(*parts, steps, strict=True):
            now = step.double() + 1
            corrected1, corrected2 = 1 - beta1**now, 1 - beta2**now
            for weight, grad, m, v in zip(*(tensor.split(BLOCK) for tensor in tensors), strict=True):
                m.lerp_(grad, 1 - beta1)
                v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
                d = (v / corrected2).sqrt_().add_(TINY)
                divisor = d.pow(1 - self.gate).mul_(eps**self.gate).add_(d).mul_(corrected1)
                weight.mul_(keep).addcdiv_(m, divisor, value=-group["lr"] * rate)


def make_adam(config: OptimizerConfig, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer that `optimizer.implementation` asks for: torch's fused one, DeepSpeed's, or NVIDIA apex's; with
    `optimizer.gate` the gated one.

    Raises `UserError` where it is not installed or cannot be built.
    """
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    options["weight_decay"] = 0.0  # each group has its own
    if config.gate is not None:
        return GatedAdamW(groups, config.gate, **options)
    if config.implementation == "torch":
        return SegmentedAdamW(groups, fused=True, **options)
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
        optimizer.state[flat]["step"] = torch.full((), float(step), dtype=torch.float32, device=flat.device)
    elif type(optimizer).__module__.startswith("apex"):
        _group_of(optimizer, flat)["step"] = step
    else:
        optimizer.state[flat]["step"] = step


def _group_of(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is flat for p in group["params"]))
