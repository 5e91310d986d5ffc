"""The main loop: train, validate, grow when kappa says so, until the budget is spent."""

from __future__ import annotations

import math
import time
from pathlib import Path

from megabus.config import RunConfig
from megabus.data.order import align_up
from megabus.engine.engine import StepResult
from megabus.errors import UserError
from megabus.growth.transition import grow_engine
from megabus.kappa.broadcast import GrowthSignal, broadcast_decision
from megabus.kappa.monitor import cap_is_reached
from megabus.train.flops import flops_per_token, peak_flops
from megabus.train.metrics import describe, step_line
from megabus.train.run import Run, finish, sizes, start, watch_stage
from megabus.train.schedule import learning_rate, spent_share


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


def train_step(run: Run) -> None:
    """One optimizer step, its accounting and its log line."""
    begun, stage, config = time.perf_counter(), run.stage, run.config
    cost = stage.tokens_per_step * flops_per_token(stage.model, stage.seq_len)
    # At the step's middle: a warm-up does not begin, nor a decay end, with a step of learning rate 0.
    middle = spent_share(config.train, run.step + 0.5, run.tokens + stage.tokens_per_step / 2, run.flops + cost / 2)
    lr = learning_rate(config.optimizer, stage.lr, middle)
    result = run.engine.train_step(run.corpora.train_batches(run.engine, run.position), lr)
    _refuse_non_finite(run, result)
    run.step += 1
    run.tokens += stage.tokens_per_step
    run.position += stage.tokens_per_step
    run.flops += cost
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
    peak = peak_flops(run.config.log.peak_tflops, run.config.train.precision)
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
        print(step_line(row, run.stage, run.view if run.can_grow else None, _seconds_left(run)), flush=True)


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
    used, stage = (run.tokens - run.stage_start[0], run.flops - run.stage_start[1]), run.stage
    return run.can_grow and cap_is_reached(*used, stage.max_tokens, stage.max_flops)


def observe(run: Run, loss: float) -> GrowthSignal:
    """Rank 0's monitor sees a validation loss and decides; all ranks learn the one decision."""
    signal = None
    if run.monitor is not None and run.metrics is not None:
        decision = run.monitor.observe(run.tokens, run.flops, loss)
        run.view = decision.view
        extra = decision.view.as_dict() if decision.view is not None else {}
        run.metrics.write("eval", run.totals | {"loss": loss} | extra)
        print(f"step {run.step:>5} | validation loss {loss:.4f}", flush=True)
        # Where the learning rate falls, no law of the loss holds that kappa could go by: only a cap grows there.
        decaying = run.config.optimizer.schedule == "wsd" and run.share > 1 - run.config.optimizer.decay_share
        growing = decision.grow and run.can_grow and run.share < 1 and not (decaying and decision.reason == "kappa")
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
    run.stage_start = (run.tokens, run.flops)
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
            "bytes_sent": transition.sent,
            "bytes_kept": transition.kept,
        }
        run.metrics.write("growth", row)
        print(
            f"step {run.step:>5} | GROWTH ({signal.reason}) {describe(old)} -> {describe(new)} | loss {before:.6f} -> "
            f"{after:.6f} | {stall:.1f} s, {transition.sent / 2**20:.1f} MiB sent",
            flush=True,
        )
        watch_stage(run)
    # The grown size's first loss is the start of its own kappa; it does not grow at once.
    observe(run, after if new.seq_len == old.seq_len else validate(run))
