"""Step time, MFU and memory of the shipped models, and where the time of two micro batches goes."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.gpu_check.part import Check
from benchmarks.training import shape
from megabus.config import Layout, RunConfig, Stage, load_config, resolve_stages
from megabus.config.schema import OptimizerConfig, TrainConfig
from megabus.engine.startup import start_distributed
from megabus.kernels.choice import Choice, why_not
from megabus.model.cost import flops_per_token
from megabus.model.peak import peak_flops
from megabus.testing.training import make_training

if TYPE_CHECKING:
    from megabus.estimate.layouts import Choice as Setting

ROOT = Path(__file__).resolve().parents[2]
STEPS, MICRO_BATCHES, TOP = 5, 2, 25
SIZES = ("0.5b", "1b")
KINDS = ("ngpt", "gpt")
NAME = 100  # characters of a kernel's name, at most
# What the host may call to wait for the device, or is answered by it.
WAITS = ("Synchronize", "aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class Arm(NamedTuple):
    train: TrainConfig
    optimizer: OptimizerConfig
    stage: Stage


def step_times(check: Check) -> None:
    """One arm at a time in memory; Triton's form first, which is what counts."""
    start_distributed()
    for kernels in ("triton", "eager"):
        for size in ("tiny",) if check.small else SIZES:
            if kernels == "triton" and not _runs_triton(check):
                check.tell(f"{size}, triton", "does not run here" if check.on_gpu else "needs a GPU")
                continue
            seconds = {kind: _one_arm(check, size, kind, kernels) for kind in KINDS}
            if seconds["ngpt"] and seconds["gpt"]:
                ratio = seconds["ngpt"] / seconds["gpt"]
                message = f"{ratio:.3f} of the seconds a token, in the same micro batches (the bar is 1.03 with Triton)"
                check.tell(f"{size}, nGPT / gpt, {kernels}", message)


def _one_arm(check: Check, size: str, kind: str, kernels: Choice) -> float | None:
    """Seconds a token, or None where the model does not fit."""
    what, problem = f"{size}, {kind} {kernels}", ""
    try:
        arm = _arm(check, size, kind, kernels)
        took, peak = _timed(arm)
    except torch.OutOfMemoryError as error:
        problem = " ".join(str(error).split())[:120]
    if problem:  # here the traceback, and what its frames hold, are gone
        gc.collect()
        torch.cuda.empty_cache()
        check.tell(what, f"does not fit: {problem}")
        return None
    check.tell(what, _described(arm, took, peak))
    return took / arm.stage.tokens_per_step


def profile(check: Check) -> None:
    """Kernels and waits of a step of two micro batches."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    start_distributed()
    from megabus.engine.engine import Engine

    arm = _arm(check, "tiny" if check.small else SIZES[0], "ngpt", "triton" if _runs_triton(check) else "eager")
    engine = Engine(arm.train, arm.optimizer, arm.stage)
    engine.write_initial(0)
    batches = batches_of(engine)
    for _ in range(2):
        engine.train_step(batches, 1e-3)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if check.on_gpu else [])]
    with profiled(activities=activities) as found:
        engine.train_step(batches, 1e-3)
    # Regions that somebody has named hold kernels which are told themselves; not every torch marks them.
    events: Any = [e for e in found.key_averages() if not getattr(e, "is_user_annotation", False)]
    on_device = (
        [e for e in events if e.device_type != torch._C._autograd.DeviceType.CPU] if check.on_gpu else list(events)
    )
    spent = (lambda e: e.self_device_time_total) if check.on_gpu else (lambda e: e.self_cpu_time_total)
    total = sum(map(spent, on_device)) or 1
    where = "kernels on the device" if check.on_gpu else "operations (the device's kernels need a GPU)"
    check.tell(where, f"{sum(e.count for e in on_device):,} in {total / 1e3:.1f} ms")
    for event in sorted(on_device, key=spent, reverse=True)[:TOP]:
        share = spent(event) / total
        check.tell(short(event.key), f"{event.count} x, {spent(event) / 1e3:.2f} ms, {share:.1%}")
    waits = [e for e in events if any(part in e.key for part in WAITS)]
    for event in sorted(waits, key=lambda e: -e.count):
        check.tell(f"wait: {event.key}", f"{event.count} x, {event.cpu_time_total / 1e3:.2f} ms of the host")
    engine.close()


def short(kernel: str) -> str:
    """A kernel's name without its middle: names of templates begin alike, and what differs stands at their end."""
    half = (NAME - 3) // 2
    return kernel if len(kernel) <= NAME else f"{kernel[:half]}...{kernel[-half:]}"


def _runs_triton(check: Check) -> bool:
    return check.on_gpu and why_not("triton", torch.device("cuda")) is None


def _arm(check: Check, size: str, kind: str, kernels: Choice) -> Arm:
    """A shipped configuration in steps of two micro batches. Their size, and whether they are recomputed, is the
    estimator's choice for this GPU of what fits both kinds, which can only be compared in the same setting."""
    if check.small:
        batch = {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 2 * MICRO_BATCHES, "kernels": kernels}
        tiny = make_training(shape(kind, 32, 2, 128), Layout(1, 1, 1), batch, {"lr": 1e-3})
        return Arm(tiny.train, tiny.optimizer, tiny.stage)
    card = torch.cuda.get_device_properties(0)
    config, found = _shipped(size, kind, kernels, card.name, card.total_memory)
    if found is None:
        raise torch.OutOfMemoryError(f"the estimator finds no micro batch of {kind} {size} that fits {card.name}")
    others = (_shipped(size, other, kernels, card.name, card.total_memory)[1] for other in KINDS if other != kind)
    # Recomputed, and small, is what takes least.
    setting = min((found, *filter(None, others)), key=lambda one: (not one.recompute, one.stage.micro_batch_size))
    train, micro = config.train.model_copy(update={"recompute": setting.recompute}), setting.stage.micro_batch_size
    stage = replace(found.stage, micro_batch_size=micro, global_batch_size=MICRO_BATCHES * micro)
    return Arm(train, config.optimizer, stage)


def _shipped(size: str, kind: str, kernels: Choice, card: str, memory: int) -> tuple[RunConfig, Setting | None]:
    """A shipped configuration on one such GPU, and the fastest setting that fits."""
    from megabus.estimate.devices import like
    from megabus.estimate.layouts import settings

    overrides = [f"model.kind={kind}", f"train.kernels={kernels}", "layout.tp=1", "layout.pp=1"]
    config = load_config(ROOT / f"configs/ngpt_{size}.yaml", overrides)
    (stage,) = resolve_stages(config, 1)
    return config, settings(config, stage, stage.layout, like(card, memory, 1))


def batches_of(engine: Any) -> list[Any]:
    stage = engine.stage
    sizes = (stage.grad_accum, stage.micro_batch_size, stage.seq_len + 1)
    tokens = torch.randint(stage.model.vocab_size, sizes, generator=torch.Generator().manual_seed(0)).to(engine.device)
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens]


def _timed(arm: Arm) -> tuple[float, int | None]:
    """(seconds a step, the median of some; the most bytes that tensors took of the GPU). Then all of it is freed."""
    from megabus.engine.engine import Engine

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    engine = Engine(arm.train, arm.optimizer, arm.stage)
    try:
        engine.write_initial(0)
        batches, took = batches_of(engine), []
        for _ in range(2 + STEPS):
            begun = time.perf_counter()
            engine.train_step(batches, 1e-3)  # returns once the device is done: it tells the loss
            took.append(time.perf_counter() - begun)
        peak = torch.cuda.max_memory_allocated() if engine.device.type == "cuda" else None
        return median(took[2:]), peak
    finally:
        engine.close()


def _described(arm: Arm, seconds: float, peak: int | None) -> str:
    stage = arm.stage
    tokens = stage.tokens_per_step
    most = peak_flops(None, arm.train.precision)
    reached = tokens * flops_per_token(stage.model, stage.seq_len) / seconds
    mfu = "no peak is known" if most is None else f"MFU {reached / most:.1%}"
    memory = "" if peak is None else f", {peak / 2**30:.1f} GiB at its peak"
    batch = f"{stage.grad_accum} x {stage.micro_batch_size} x {stage.seq_len} tokens"
    recompute = ", recompute" if arm.train.recompute else ""
    return f"{seconds * 1e3:.1f} ms a step of {batch}{recompute}, {tokens / seconds:,.0f} tokens/s, {mfu}{memory}"
