"""The main loop: train, validate, grow when kappa says so, until the budget is spent."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megabus.checkpoint.save import save_model
from megabus.config import RunConfig, Stage, resolve_stages
from megabus.data.order import align_up
from megabus.engine.engine import Engine, StepResult
from megabus.errors import UserError
from megabus.growth.transition import grow_engine
from megabus.kappa.broadcast import GrowthSignal, broadcast_decision
from megabus.kappa.monitor import KappaMonitor, KappaSettings, KappaView
from megabus.kappa.predictors import make_predictor
from megabus.model.init import initial_rows
from megabus.parallel.agree import agreement
from megabus.parallel.fragments import Fragments
from megabus.train.corpora import Corpora
from megabus.train.flops import count_parameters, flops_per_token, peak_flops
from megabus.train.metrics import Metrics, describe, step_line
from megabus.train.schedule import learning_rate, spent_share


@dataclass
class Run:
    """All that changes while a run goes on. `position` is the place in the data order, in tokens: it runs ahead
    of `tokens` only where a longer sequence must start at a multiple of itself."""

    config: RunConfig
    stages: list[Stage]
    corpora: Corpora
    engine: Engine
    monitor: KappaMonitor | None  # on rank 0
    metrics: Metrics | None  # on rank 0
    step: int = 0
    tokens: int = 0
    position: int = 0
    flops: float = 0.0
    stage_tokens: int = 0
    stage_flops: float = 0.0
    view: KappaView | None = None
    pace: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=20))  # (clock, share)

    @property
    def stage(self) -> Stage:
        return self.engine.stage

    @property
    def share(self) -> float:
        return spent_share(self.config.train, self.step, self.tokens, self.flops)

    @property
    def totals(self) -> dict[str, Any]:
        return {"step": self.step, "tokens": self.tokens, "flops": self.flops, "stage": self.stage.index}


def train(config: RunConfig) -> Path:
    """Train to the end of the budget; returns the directory of the final checkpoint. Collective."""
    run = start(config)
    observe(run, validate(run))
    while run.share < 1:
        train_step(run)
        if run.step % config.eval.every == 0 or stage_is_spent(run) or run.share >= 1:
            loss = validate(run)
            signal = observe(run, loss)
            if signal.grow:
                grow(run, signal, loss)
    return finish(run)


def start(config: RunConfig) -> Run:
    """Check everything that can be checked, then build the first stage with its initial weights."""
    with agreement():
        stages = resolve_stages(config, dist.get_world_size())
        corpora = Corpora(config, stages)
        kappa = _kappa_settings(config)
        if dist.get_rank() == 0:
            _make_run_dir(config)
    engine = Engine(config, stages[0])
    engine.write(initial_fragments(engine, config.train.seed))
    run = Run(config, stages, corpora, engine, monitor=None, metrics=None)
    if dist.get_rank() == 0:
        run.metrics, run.monitor = Metrics(config), KappaMonitor(kappa)
        run.metrics.write("start", run.totals | {"sizes": sizes(run.stage), "layout": str(run.stage.layout)})
        print(f"{len(stages)} stage(s), first: {describe(run.stage)}, {count_parameters(run.stage.model):,} parameters")
        _watch_stage(run)
    return run


def _make_run_dir(config: RunConfig) -> None:
    path = Path(config.run_dir)
    if (path / "metrics.jsonl").exists():
        raise UserError("run_dir", path, "holds a run already", "choose another run_dir, or remove that one")
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    except OSError as error:
        raise UserError("run_dir", path, f"cannot be written ({error.strerror})", "choose a writable place") from error


def _kappa_settings(config: RunConfig) -> KappaSettings:
    trigger = config.growth.trigger
    options: dict[str, Any] = {
        "constant": {"loss": trigger.constant},
        "scaling_law": trigger.scaling_law.model_dump(),
        "reference": {"table": trigger.reference},
        "fit": {},
    }[trigger.predictor]
    return KappaSettings(
        kappa=trigger.kappa,
        predictor=make_predictor(trigger.predictor, **options),
        smoothing=trigger.smoothing,
        patience=trigger.patience,
        min_evals=trigger.min_evals,
        start=trigger.start,
        max_std=trigger.max_std,
    )


def initial_fragments(engine: Engine, seed: int) -> Fragments:
    """This rank's part of the initial state, drawn without drawing any other."""
    fragments: Fragments = {}
    for piece in engine.placement.owned(engine.mesh.rank):
        width = engine.placement.width(piece.name)
        first, last = piece.start // width, -(-piece.stop // width)
        rows = initial_rows(engine.stage.model, piece.name, seed, first, last).reshape(-1)
        offset = piece.start - first * width
        fragments[piece] = {"weight": rows[offset : offset + len(piece)]}
    return fragments


def train_step(run: Run) -> None:
    """One optimizer step, its accounting and its log line."""
    begun, stage, config = time.perf_counter(), run.stage, run.config
    lr = learning_rate(config.optimizer, stage.lr, run.share)
    result = run.engine.train_step(run.corpora.train_batches(run.engine, run.position), lr)
    _refuse_non_finite(run, result)
    cost = stage.tokens_per_step * flops_per_token(stage.model, stage.seq_len)
    run.step += 1
    run.tokens += stage.tokens_per_step
    run.position += stage.tokens_per_step
    run.stage_tokens += stage.tokens_per_step
    run.flops += cost
    run.stage_flops += cost
    unit_error = None
    if run.step % config.log.unit_norm_every == 0:
        unit_error = run.engine.unit_error()
    if run.metrics is not None:
        elapsed = time.perf_counter() - begun
        _log_step(run, result, lr, unit_error, elapsed, cost)


def _refuse_non_finite(run: Run, result: StepResult) -> None:
    for name, value in (("loss", result.loss), ("grad_norm", result.grad_norm)):
        if not math.isfinite(value):
            problem = f"is not finite at step {run.step + 1} ({describe(run.stage)})"
            raise UserError(f"train.{name}", value, problem, "lower optimizer.lr or look at the data of that step")


def _log_step(run: Run, result: StepResult, lr: float, unit_error: float | None, elapsed: float, cost: float) -> None:
    assert run.metrics is not None
    world = run.stage.layout.world
    tokens_per_s = run.stage.tokens_per_step / elapsed
    peak = peak_flops(run.config.log.peak_tflops)
    row = run.totals | {
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": tokens_per_s / world,
        "mfu": None if peak is None else cost / elapsed / (peak * world),
        "unit_error": unit_error,
        "share": run.share,
    }
    run.metrics.write("step", row)
    run.pace.append((time.monotonic(), run.share))
    if run.step % run.config.log.every == 0 or run.share >= 1:
        print(step_line(row, run.stage, run.view if _can_grow(run) else None, _seconds_left(run)), flush=True)


def _seconds_left(run: Run) -> float:
    (first, low), (last, high) = run.pace[0], run.pace[-1]
    return (1 - high) * (last - first) / (high - low) if high > low else 0.0


def validate(run: Run) -> float:
    """Loss in nats on the fixed validation tokens, the same on every rank."""
    return _validation_loss(run, run.stage.seq_len)


def _validation_loss(run: Run, seq_len: int) -> float:
    batches = run.corpora.valid_batches(run.engine, seq_len)
    return run.engine.evaluate(batches, run.corpora.valid_steps(run.stage, seq_len), seq_len)


def stage_is_spent(run: Run) -> bool:
    """Whether the stage's cap is reached: known to all ranks without a word, so that they validate together."""
    stage = run.stage
    tokens, flops = stage.max_tokens or math.inf, stage.max_flops or math.inf
    return _can_grow(run) and (run.stage_tokens >= tokens or run.stage_flops >= flops)


def _can_grow(run: Run) -> bool:
    return run.stage.index + 1 < len(run.stages)


def observe(run: Run, loss: float) -> GrowthSignal:
    """Rank 0's monitor sees a validation loss and decides; all ranks learn the one decision."""
    signal = None
    if run.monitor is not None and run.metrics is not None:
        decision = run.monitor.observe(run.tokens, run.flops, loss)
        run.view = decision.view
        extra = decision.view.as_dict() if decision.view is not None else {}
        run.metrics.write("eval", run.totals | {"loss": loss} | extra)
        print(f"step {run.step:>5} | validation loss {loss:.4f}", flush=True)
        growing = decision.grow and _can_grow(run) and run.share < 1
        signal = GrowthSignal(growing, decision.reason if growing else None, run.stage.index + growing, run.step)
    return broadcast_decision(signal, device=run.engine.device)


def grow(run: Run, signal: GrowthSignal, before: float) -> None:
    """Grow into the next stage, and measure on the same tokens what it did to the loss (`before`)."""
    old, new = run.stage, run.stages[signal.stage]
    begun = time.perf_counter()
    transition = grow_engine(run.engine, run.config, new)
    stall = time.perf_counter() - begun
    run.engine = transition.engine
    after = _validation_loss(run, old.seq_len)
    run.position = align_up(run.position, new.seq_len)
    run.stage_tokens, run.stage_flops = 0, 0.0
    run.pace.clear()
    unit_error = run.engine.unit_error()
    if run.metrics is not None:
        row = run.totals | {
            "from_stage": old.index,
            "to_stage": new.index,
            "old": sizes(old),
            "new": sizes(new),
            "old_layout": str(old.layout),
            "new_layout": str(new.layout),
            "reason": signal.reason,
            "loss_before": before,
            "loss_after": after,
            "unit_error": unit_error,
            "stall_s": stall,
            "bytes_sent": transition.traffic.sent,
            "bytes_kept": transition.traffic.kept,
        }
        run.metrics.write("growth", row)
        print(
            f"step {run.step:>5} | GROWTH ({signal.reason}) {describe(old)} -> {describe(new)} | loss {before:.6f} -> "
            f"{after:.6f} | {stall:.1f} s, {transition.traffic.sent / 2**20:.1f} MiB sent",
            flush=True,
        )
        _watch_stage(run)
    # The grown size's first loss is the start of its own kappa; it does not grow at once.
    observe(run, after if new.seq_len == old.seq_len else validate(run))


def _watch_stage(run: Run) -> None:
    if run.monitor is not None:
        stage = run.stage
        run.monitor.start_stage(
            stage.index,
            count_parameters(stage.model),
            stage.kappa,
            stage.max_tokens,
            stage.max_flops,
            tokens=run.tokens,
            flops=run.flops,
        )


def sizes(stage: Stage) -> dict[str, int]:
    model = stage.model
    return {
        "d_model": model.d_model,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.kv_heads,
        "d_ff": model.d_ff,
        "n_params": count_parameters(model),
    }


def finish(run: Run) -> Path:
    """Save the canonical state and close everything."""
    folder = Path(run.config.run_dir) / "checkpoint"
    save_model(run.engine, run.config, folder, run.totals)
    if run.metrics is not None:
        run.metrics.close()
    run.engine.close()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return folder
