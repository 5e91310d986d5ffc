"""Ten steps of training in each precision and form beside plain PyTorch on the CPU, and grown bits beside the CPU's."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu_check.part import Check
from megabus.config import GrowthConfig, Layout, ModelConfig, Stage
from megabus.engine.startup import start_distributed
from megabus.growth.state import grow_state
from megabus.kernels.choice import Choice, why_not
from megabus.model.decoder import param_specs
from megabus.model.init import build_model, initial_rows
from megabus.model.params import global_shape
from megabus.parallel.fragments import KINDS
from megabus.testing.parity import batch_of, plain_trace, rank_batches, worst
from megabus.testing.training import Training, make_training

STEPS = 10
# The largest difference of a loss from fp32 on the CPU, of what it falls by: rounding, which Adam's steps magnify.
# On a CPU it is 3e-7 in fp32 and 2e-4 in bf16, and 7e-4 and 3e-2 under the learning rates of the controls.
LIMITS = {"fp32": 1e-4, "bf16": 1e-2}
CONTROLS = {"fp32": 0.999, "bf16": 0.95}  # of the learning rate: too little of it must be noticed
MANNERS: list[dict[str, Any]] = [{"depth": "append"}, {"read": "tilt", "moments": "grow"}, {"read": "clone"}]


def _training(small: bool, precision: str, kernels: Choice, rate: float = 1.0) -> Training:
    """rate: of the learning rate, at which the loss of one batch falls by more than a nat in so many steps."""
    sizes = {"d_model": 36, "n_heads": 3, "head_dim": 12, "d_ff": 62} if small else {}
    sizes = sizes or {"d_model": 192, "n_heads": 3, "head_dim": 64, "d_ff": 500}
    model = {"vocab_size": 67 if small else 1000, "n_layers": 2 if small else 4, **sizes}
    batch = {"seq_len": 16 if small else 128, "micro_batch_size": 2, "global_batch_size": 8}
    how = {"precision": precision, "kernels": kernels}
    return make_training(model, Layout(1, 1, 1), batch | how, {"lr": rate * (4e-2 if small else 2e-2), "eps": 1e-6})


def steps(check: Check) -> None:
    """Every arm draws the same weights and reads the same tokens, the same in each step: of a loss that does not fall a
    wrong gradient would show nothing."""
    start_distributed()
    reference = plain_trace(_training(check.small, "fp32", "eager"), steps=STEPS, batch=_batch).losses
    fall = reference[0] - reference[-1]
    check.tell("plain PyTorch, CPU, fp32", f"loss {reference[0]:.6f} to {reference[-1]:.6f} in {STEPS} steps", fall > 1)
    device = torch.device("cuda" if check.on_gpu else "cpu")
    for precision, limit in LIMITS.items():
        for kernels in ("eager", "triton"):
            what = f"{kernels}, {precision}"
            if kernels == "triton" and (not check.on_gpu or why_not(kernels, device) is not None):
                check.tell(what, why_not(kernels, device) or "needs a GPU")
                continue
            losses = _losses(_training(check.small, precision, kernels))
            off = _apart(losses, reference) / fall
            text = f"loss {losses[0]:.6f} to {losses[-1]:.6f}, {off:.1e} of its fall off the CPU (limit {limit:g})"
            check.tell(what, text, off <= limit)
        rate = CONTROLS[precision]
        off = _apart(_losses(_training(check.small, precision, "eager", rate)), reference) / fall
        text = f"{off:.1e} of the fall off the CPU, which must be noticed"
        check.tell(f"control: {rate:g} of the learning rate, {precision}", text, off > limit)


def _batch(stage: Stage, _: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batch_of(stage, 0)


def _losses(training: Training) -> list[float]:
    from megabus.engine.engine import Engine

    engine = Engine(training.train, training.optimizer, training.stage)
    engine.write_initial(training.train.seed)
    batches = (rank_batches(engine, _batch(training.stage, step)) for step in range(STEPS))
    losses = [engine.train_step(batch, training.optimizer.lr).loss for batch in batches]
    engine.close()
    return losses


def _apart(losses: list[float], reference: list[float]) -> float:
    return worst(abs(a - b) for a, b in zip(losses, reference, strict=True))


def growth_bits(check: Check) -> None:
    """Weights drawn, and weights and moments grown, on the device and on the CPU."""
    device = torch.device("cuda" if check.on_gpu else "cpu")
    if not check.on_gpu:
        check.tell("device", "needs a GPU: here the CPU is compared with itself")
    width = 36 if check.small else 384
    heads = {"n_heads": width // 12, "head_dim": 12, "d_ff": 3 * width}
    old = ModelConfig(vocab_size=67 if check.small else 32_000, d_model=width, n_layers=3, **heads)
    new = old.grown(d_model=width * 3 // 2, n_heads=old.n_heads * 3 // 2, d_ff=4 * width, n_layers=5)
    states: dict[str, dict[str, torch.Tensor]] = {}
    states["weight"] = {name: p.detach() for name, p in build_model(old, 0).named_parameters()}
    noise = torch.Generator().manual_seed(0)
    for kind in KINDS:
        if kind not in states:
            states[kind] = {name: torch.rand(x.shape, generator=noise) for name, x in states["weight"].items()}
    for manner in MANNERS:
        how = GrowthConfig.model_validate(manner)
        differ, entries = 0, 0
        for kind in KINDS:
            there = {name: x.to(device) for name, x in states[kind].items()}
            grown = grow_state(there, old, new, 7, how, kind)
            for name, mine in grow_state(states[kind], old, new, 7, how, kind).items():
                differ += int((grown[name].cpu() != mine).sum())
                entries += mine.numel()
        said = ", ".join(f"{key} {value}" for key, value in manner.items())
        check.tell(f"grown, {said}", f"{differ} of {entries:,} entries differ from the CPU's", differ == 0)
    differ = 0
    for name, spec in param_specs(new).items():
        rows = global_shape(spec, new)[0]
        on_cpu, on_device = (initial_rows(new, name, 0, 0, rows, at) for at in ("cpu", device))
        differ += int((on_device.cpu() != on_cpu).sum())
    check.tell("drawn weights", f"{differ} entries differ from the CPU's", differ == 0)
