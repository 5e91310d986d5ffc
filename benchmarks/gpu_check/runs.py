"""Whole runs as users start them: one that grows twice, is stopped and resumed; and what a growth costs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from benchmarks.gpu_check.part import Check
from benchmarks.growth_stall import LARGE, write_tokens
from benchmarks.live_rows import live_rows
from megabus.config import load_config, resolve_stages
from megabus.engine.startup import on_gpu, prepare_environment, start_distributed, stop_distributed
from megabus.kernels.choice import why_not
from megabus.testing.ranks import free_port

PER_STAGE = 6  # steps
STOPPED = 8  # the step after which the run is stopped: between its two growths

SMALL: dict[str, Any] = {
    "model": {"vocab_size": 67, "d_model": 24, "n_layers": 2, "n_heads": 2, "head_dim": 12, "d_ff": 32},
    "train": {"seq_len": 16, "micro_batch_size": 2, "global_batch_size": 4},
    "growths": [{"d_model": 36, "n_heads": 3, "d_ff": 48}, {"n_layers": 3}],
}
SIZES: dict[str, Any] = {
    "model": {"vocab_size": 8192, "d_model": 256, "n_layers": 4, "n_heads": 4, "head_dim": 64, "d_ff": 704},
    "train": {"seq_len": 512, "micro_batch_size": 4, "global_batch_size": 16, "precision": "bf16"},
    "growths": [{"d_model": 384, "n_heads": 6, "d_ff": 1056}, {"d_model": 512, "n_heads": 8, "n_layers": 6}],
}


def resume(check: Check) -> None:
    """The stopped and resumed run against one that was left alone."""
    sizes = SMALL if check.small else SIZES
    whole, parted = (_config(check, sizes, name, check.on_gpu) for name in ("whole", "parted"))
    with _training(whole) as process:
        process.join()
    _good(process, whole)
    losses, growths = _losses(whole), _rows(whole, "growth")
    text = f"{len(losses)} steps, {len(growths)} growths, loss {min(losses.values()):.3f} at its lowest"
    check.tell("grows twice", text, (len(losses), len(growths)) == (3 * PER_STAGE, 2))
    for row in growths:
        text = f"loss {row['loss_before']:.6f} before, {row['loss_after']:.6f} after"
        text += f", unit rows {row['unit_error']:.1e} off"
        check.tell(f"growth to d{row['new']['d_model']} L{row['new']['n_layers']}", text, row["unit_error"] <= 1e-6)
    with _training(parted) as process:
        for row in live_rows(parted["run_dir"], lambda: not process.is_alive(), 0.002):
            if row["event"] == "step" and row["step"] == STOPPED:
                os.kill(process.pid, signal.SIGTERM)
        process.join()
    _good(process, parted)
    before = len(_losses(parted))
    check.tell("stopped", f"after {before} of {3 * PER_STAGE} steps", STOPPED <= before < 3 * PER_STAGE)
    with _training(parted) as process:
        process.join()
    _good(process, parted)
    again = _losses(parted)
    resumed = len(_rows(parted, "resume"))
    off = max((abs(again[step] - loss) for step, loss in losses.items() if step in again), default=float("nan"))
    same = again == losses
    text = "every loss has the bits of the run that was left alone" if same else f"losses are up to {off:.1e} off"
    check.tell("resumed", text, resumed == 1 and same)


def stall(check: Check) -> None:
    """Of the growth of `benchmarks/growth_stall.py`, 35M to 58M parameters, on one rank."""
    large = {**LARGE, "growths": [{key: value for key, value in LARGE["grown"].items() if key != "layout"}]}
    sizes = {**SMALL, "growths": SMALL["growths"][:1]} if check.small else large
    config = _config(check, sizes, "growing")
    with _training(config) as process:
        process.join()
    _good(process, config)
    (growth,) = _rows(config, "growth")
    tokens = config["train"]["seq_len"] * config["train"]["global_batch_size"]
    steps = [tokens / row["tokens_per_s"] for row in _rows(config, "step")]
    before, after = steps[PER_STAGE // 2 : PER_STAGE], steps[PER_STAGE:]
    whole = growth["stall_s"] + max(0.0, after[0] - median(after[1:]))
    check.tell("a step before it, after it", f"{median(before):.4f} s, {median(after[1:]):.4f} s")
    text = f"{growth['stall_s']:.3f} s, {whole:.3f} s with what the first step after it takes longer"
    check.tell("stall", f"{text}: {whole / median(before):.1f} steps", whole <= 20 * median(before) or None)
    check.tell("bytes", f"{growth['bytes_sent']:,} sent, {growth['bytes_kept']:,} kept on the rank")
    peaks = [(row["stage"], row["max_bytes"]) for row in _rows(config, "memory")]
    check.tell("peak memory", ", ".join(f"{peak / 2**20:,.0f} MiB by stage {stage}" for stage, peak in peaks))
    check.tell("peak memory of the growth alone", _growth_peak(config))


def _growth_peak(config: dict[str, Any]) -> str:
    """Of the same growth, of an engine that has trained: a run's counters go on from its start."""
    start_distributed()
    import torch

    from benchmarks.gpu_check.speed import batches_of
    from megabus.engine.engine import Engine
    from megabus.growth.transition import grow_engine

    run = load_config(Path(config["run_dir"]).with_suffix(".yaml"))
    stages = resolve_stages(run, 1)
    engine = Engine(run.train, run.optimizer, stages[0])
    engine.write_initial(0)
    engine.train_step(batches_of(engine), 1e-3)
    on_cuda = engine.device.type == "cuda"
    before = 0
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    grow_engine(engine, run, stages[1]).engine.close()
    if not on_cuda:
        return "needs a GPU, whose memory is counted"
    peak = torch.cuda.max_memory_allocated()
    return f"{peak / 2**20:,.0f} MiB, {peak / before:.2f} times what was there before it"


def _config(check: Check, sizes: dict[str, Any], name: str, deterministic: bool = False) -> dict[str, Any]:
    """A run that grows after every `PER_STAGE` steps. deterministic: as a GPU has to be told to be."""
    tokens = check.folder / "tokens"
    if not tokens.with_suffix(".bin").exists():
        write_tokens(tokens, sizes["model"]["vocab_size"], 1 << (16 if check.small else 20))
    train = sizes["train"] | {"deterministic": deterministic}
    batch = train["seq_len"] * train["global_batch_size"]
    if check.on_gpu:
        import torch

        train["kernels"] = "triton" if why_not("triton", torch.device("cuda")) is None else "eager"
    spent = {"max_tokens": PER_STAGE * batch}
    stages = [growth | spent for growth in sizes["growths"][:-1]] + sizes["growths"][-1:]
    growth = {"moments": "grow", "stages": stages} | spent
    return {
        "run_dir": str(check.folder / name),
        "model": sizes["model"],
        "layout": {},
        "train": train | {"max_steps": (1 + len(stages)) * PER_STAGE},
        "optimizer": {"lr": 2e-3},
        "growth": growth,
        "data": {"train": str(tokens), "valid": str(tokens)},
        "eval": {"every": PER_STAGE, "tokens": 4 * batch},
        "checkpoint": {"every": 10 * PER_STAGE},
        "preflight": {"enabled": False},
    }


@contextmanager
def _training(config: dict[str, Any]) -> Iterator[Any]:
    """It runs in a process of its own."""
    run_dir = Path(config["run_dir"])
    path = run_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    context: Any = get_context("spawn" if on_gpu() else "fork")
    process = context.Process(target=_train, args=(str(path),))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def _train(path: str) -> None:
    """As `megabus train` does, but for the pictures at its end."""
    os.environ["MASTER_PORT"] = str(free_port())
    config = load_config(path)
    prepare_environment(config.train.deterministic)
    start_distributed()
    from megabus.train.loop import train

    train(config)
    stop_distributed()


def _good(process: Any, config: dict[str, Any]) -> None:
    if process.exitcode != 0:
        raise RuntimeError(f"{config['run_dir']} ended with exit code {process.exitcode}; the part's .log says why")


def _rows(config: dict[str, Any], event: str) -> list[dict[str, Any]]:
    lines = (Path(config["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def _losses(config: dict[str, Any]) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in _rows(config, "step")}
