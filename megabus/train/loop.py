"""The main loop: train, validate, grow when kappa says so, until the budget is spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megabus.checkpoint.store import folder_of
from megabus.config import RunConfig
from megabus.data.sources import bits_per_byte
from megabus.engine.engine import StepResult
from megabus.errors import say
from megabus.growth.transition import grow_engine
from megabus.kappa.broadcast import GrowthSignal, broadcast_decision
from megabus.kappa.monitor import Decision, cap_is_reached, never_met
from megabus.kappa.why import why
from megabus.model.budget import spent_share
from megabus.model.cost import counted_sizes
from megabus.model.peak import peak_flops
from megabus.parallel.agree import on_any_rank, rank_0_says
from megabus.parallel.fragments import decay_of
from megabus.report.history import NOT_FINITE, SPIKE
from megabus.train.callbacks import Callback
from megabus.train.environment import peak_memory
from megabus.train.run import Run, roll_back, run_span, started, tell_phase, watch_stage
from megabus.train.saving import cannot_be_saved, close, collect, finish, raise_failure, save, warn_unwritten
from megabus.train.schedule import angle_bound, boost_factor, decays, learning_rate, rewarm_factor
from megabus.train.stop import StoppedError, StopRequests, listening
from megabus.train.watchdog import Watchdog, watched


@dataclass(frozen=True)
class Outcome:
    """How `train` ended: the newest checkpoint, if it knows of one, and whether it was asked to stop before the end of
    the budget."""

    checkpoint: Path | None
    stopped: bool


def train(config: RunConfig, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Train to the end of the budget, from the run's newest checkpoint if there is one. Collective.

    callbacks: this rank's, beside those that the configuration names; as many of the same kind on every rank.
    """
    run_dir, rank = Path(config.run_dir), dist.get_rank()
    with listening(run_dir, rank == 0) as requests, watched(config.faults.hang_timeout, rank) as watchdog:
        try:
            return _train(config, callbacks, requests, watchdog)
        except StoppedError:
            if rank == 0:
                requests.obeyed()
            return Outcome(None, stopped=True)


def _train(config: RunConfig, callbacks: Sequence[Callback], requests: StopRequests, watchdog: Watchdog) -> Outcome:
    with started(config, callbacks, requests, watchdog) as run:
        early = requests.of_any(run.engine.device)
        if run.saved_step is None and not early:  # a checkpoint of step 0 knows its loss already
            observe(run, validate(run))
            early = requests.of_any(run.engine.device)
        if early and run.share < 1:  # the next start makes the same of this one's
            close(run)
            if run.metrics is not None:
                requests.obeyed()
            raise_failure(run)
            if run.saved_step is None:
                raise StoppedError
            return Outcome(folder_of(run.saver.root, run.saved_step), stopped=True)
        requests.begun = True
        while run.share < 1 and (not run.stopping or cannot_be_saved(run)):
            train_step(run)
            run.saver.prepare(run.engine.read)
            run.save_is_due |= run.progress.step % config.checkpoint.every == 0
            failed = has_failed(run)
            if not failed:
                validation = None
                if run.progress.step % config.eval.every == 0 or stage_is_spent(run) or run.share >= 1:
                    validation = validate(run)
                    signal = observe(run, validation)
                    if signal.grow:
                        grow(run, signal, validation.loss)
                        run.save_is_due = True
                turn(run, validation)
            agree_on_step_end(run, failed)
            if failed:
                roll_back(run)
            elif run.save_is_due:
                save(run)
        return Outcome(finish(run), stopped=run.share < 1)


def train_step(run: Run) -> None:
    """One optimizer step, its accounting and its log line."""
    begun, stage, config, now = time.perf_counter(), run.stage, run.config, run.progress
    _watch(run, f"step {now.step + 1}")
    cost = run.step_flops
    # At the step's middle: a warm-up does not begin, nor a decay end, with a step of learning rate 0.
    middle = spent_share(config.train, now.step + 0.5, now.tokens + stage.tokens_per_step / 2, now.flops + cost / 2)
    lr = learning_rate(config.optimizer, stage.lr, middle)
    since = None  # tokens since the last growth; the first stage has grown from nothing
    if stage.index:
        since = now.tokens + stage.tokens_per_step / 2 - now.stage_tokens
        run.engine.boost.factor = boost_factor(config.growth.boost, since)
        lr *= rewarm_factor(config.growth.rewarm, since)
    if run.engine.angle_cap is not None:
        run.engine.angle_cap.bound = angle_bound(config.optimizer.max_angle, config.growth.settle, since)
    run.engine.refuses = run.spikes.asked
    result = run.engine.train_step(run.corpora.train_batches(run.engine, now.position), lr)
    now.step += 1
    now.tokens += stage.tokens_per_step
    now.position += stage.tokens_per_step
    now.flops += cost
    skipped = not result.updates  # on all ranks or on none: a decision to save or to return hangs on it
    now.nonfinite_in_a_row = now.nonfinite_in_a_row + 1 if skipped else 0
    now.nonfinite += skipped
    now.spikes += result.refused
    unit_error = None
    if now.step % config.log.unit_norm_every == 0:
        unit_error = run.engine.unit_error()
    elapsed = time.perf_counter() - begun
    row = _step_row(run, result, lr, unit_error, elapsed, cost)
    run.tell("skip" if skipped else "step", row | (_why_skipped(run, result) if skipped else {}))
    run.spikes.see(result)


def _why_skipped(run: Run, result: StepResult) -> dict[str, Any]:
    if not result.refused:
        return {"reason": NOT_FINITE}
    most = run.spikes.limits
    return {"reason": SPIKE} | ({"loss_limit": most.loss, "grad_norm_limit": most.grad_norm} if most else {})


def _watch(run: Run, doing: str) -> None:
    """From now on each micro batch is progress, until something else begins."""
    run.watchdog.heartbeat(doing)
    run.engine.heartbeat = run.watchdog.heartbeat


def has_failed(run: Run) -> bool:
    """Whether too many steps in a row made no update, so that the run returns to the last checkpoint: the same on all
    ranks. Asked before the model may grow or the samples change, for what comes of either is undone by a return."""
    unsound = run.progress.nonfinite_in_a_row > run.config.faults.max_skips
    if unsound and run.spikes.accept():
        run.progress.nonfinite_in_a_row, unsound = 0, False
        rank_0_says(f"step {run.progress.step:>5} | so many spikes in a row are a new level: it is taken for the scale")
    return unsound


def agree_on_step_end(run: Run, failed: bool) -> None:
    """At the end of a step, what any rank knows becomes known to all. failed: it returns to the last checkpoint, which
    must be whole."""
    run.watchdog.heartbeat(f"the end of step {run.progress.step}")
    metrics = run.metrics
    stop, ended, unwritten = on_any_rank(
        [
            run.requests.poll(),
            run.saver.ended,
            metrics is not None and metrics.error is not None,
        ],
        run.engine.device,
    )
    if stop and metrics is not None:
        message = "saving once the steps without an update are over" if cannot_be_saved(run) else "saving"
        say(f"asked to stop by {run.requests.reason or 'a signal to another rank'}: {message}")
    run.stopping |= stop
    if ended or failed:
        collect(run)
    if unwritten:
        warn_unwritten(run)
    else:
        run.warned_unwritten = False


def _step_row(
    run: Run, result: StepResult, lr: float, unit_error: float | None, elapsed: float, cost: float
) -> dict[str, Any]:
    world = run.stage.layout.world
    tokens_per_s = run.stage.tokens_per_step / elapsed
    peak = peak_flops(run.config.log.peak_tflops, run.config.train.precision)
    row = {
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_gpu": tokens_per_s / world,
        "mfu": None if peak is None else cost / elapsed / (peak * world),
        "unit_error": unit_error,
        "share": run.share,
    }
    if run.engine.boost.factor != 1:
        row["boost"] = run.engine.boost.factor
    if run.engine.angle_cap is not None and isfinite(run.engine.angle_cap.bound):
        row["max_angle"] = run.engine.angle_cap.bound
    return row


class Validation(NamedTuple):
    """Loss in nats on the fixed validation tokens, the same on every rank; seconds that it took this one."""

    loss: float
    seconds: float


def validate(run: Run, seq_len: int | None = None) -> Validation:
    """seq_len: of the stage, unless given."""
    begun = time.perf_counter()
    _watch(run, f"the validation after step {run.progress.step}")
    loss = run.corpora.validation_loss(run.engine, seq_len or run.stage.seq_len)
    return Validation(loss, time.perf_counter() - begun)


def _averaged_losses(run: Run) -> dict[str, float]:
    """The same of each running mean of the weights, by its decay, once it is one of any update. Collective."""
    losses = {}
    for kind, updates in run.engine.averages.updates.items():
        if updates and (decay := decay_of(kind)) is not None:
            with run.engine.computing_with(kind):
                losses[decay] = validate(run).loss
    return losses


def stage_is_spent(run: Run) -> bool:
    """Whether the stage's cap is reached: known to all ranks without a word, so that they validate together."""
    now, stage = run.progress, run.stage
    used = (now.tokens - now.stage_tokens, now.flops - now.stage_flops)
    return run.can_grow and cap_is_reached(*used, stage.max_tokens, stage.max_flops)


def observe(run: Run, validation: Validation) -> GrowthSignal:
    """Rank 0's monitor sees a validation loss and decides; all ranks learn the one decision."""
    signal, loss, begun = None, validation.loss, time.perf_counter()
    row: dict[str, Any] = {"loss": loss, "bits_per_byte": bits_per_byte(run.corpora.sources.valid, loss)}
    means = _averaged_losses(run)
    row["seconds"] = validation.seconds + (time.perf_counter() - begun)  # weights change places for a mean, too
    if means:
        row["ema"] = means
    if dist.get_rank() == 0:
        decision = _decide(run, loss)
        trigger = run.config.growth.trigger
        if decision.view is not None:
            row |= decision.view.as_dict()
            if warning := never_met(decision.view, loss, trigger.predictor):
                say(warning)
            if run.config.log.why:
                row["why"] = why(decision, decision.view, trigger)
        growing = decision.grow and run.can_grow and run.share < 1
        signal = GrowthSignal(growing, decision.reason if growing else None, run.stage.index + growing)
    run.tell("eval", row)
    _gauge(run)
    return broadcast_decision(signal, device=run.engine.device)


def _decide(run: Run, loss: float) -> Decision:
    """What rank 0's monitor makes of a validation loss."""
    only_cap = decays(run.config.optimizer, run.share)
    decision = run.monitor.observe(run.progress.tokens, run.progress.flops, loss, only_cap=only_cap)
    run.view = decision.view
    return decision


def _gauge(run: Run) -> None:
    """What is too dear for every step, beside a validation: how the gains lie, and what memory the ranks take."""
    run.tell("gains", run.engine.gain_percentiles())
    run.tell("memory", peak_memory(run.engine.device))


def turn(run: Run, validation: Validation | None) -> None:
    """Go into the phase that the next step is of, if it is another one. validation: of this step.

    The curve that κ goes by begins anew, and so does the scale of updates: under other samples the loss follows
    another law, and other batches have other gradient norms.
    """
    old, new = run.stage, run.stages[run.stage.index].at(run.share)
    if new == old or run.share >= 1:
        return
    run.engine.rebatch(new)
    run.place()
    run.spikes.begin()
    run.mark()
    tell_phase(run, old)
    run.monitor.begin_anew()
    run.monitor.retarget(run_span(run))
    if validation is None or new.seq_len != old.seq_len:
        observe(run, validate(run))
    elif dist.get_rank() == 0:  # told already: it is the new curve's first point, too
        _decide(run, validation.loss)


def grow(run: Run, signal: GrowthSignal, before: float) -> None:
    """Grow into the next stage, and measure on the same tokens what it did to the loss (`before`)."""
    old, new, now = run.stage, run.stages[signal.stage].at(run.share), run.progress
    was, grown_to = counted_sizes(old.model), counted_sizes(new.model)
    for callback in run.callbacks:
        callback.before_growth(run)
    run.watchdog.heartbeat(f"the growth after step {now.step}")
    begun = time.perf_counter()
    grown = grow_engine(run.engine, run.config, new)
    stall = time.perf_counter() - begun
    run.engine = grown.engine
    after = validate(run, old.seq_len)
    run.place()
    now.stage_tokens, now.stage_flops = now.tokens, now.flops
    run.spikes.begin()  # what a growth makes of the loss is no spike
    run.mark()
    now.growths.append(run.totals | {"reason": signal.reason, "old": was, "new": grown_to})
    run.watchdog.heartbeat()
    watch_stage(run)
    run.tell(
        "growth",
        {
            "from_stage": old.index,
            "to_stage": new.index,
            "old": was,
            "new": grown_to,
            "old_layout": str(old.layout),
            "new_layout": str(new.layout),
            "reason": signal.reason,
            "loss_before": before,
            "loss_after": after.loss,
            "unit_error": run.engine.unit_error(),
            "stall_s": stall,
            "bytes_sent": grown.sent,
            "bytes_kept": grown.kept,
        },
    )
    if old.at(run.share) != old or old.weights != new.weights:  # a phase that begins with the growth
        tell_phase(run, old)
    # The grown size's first loss is the start of its own kappa; it does not grow at once.
    if new.seq_len != old.seq_len:
        longer = validate(run)
        after = Validation(longer.loss, after.seconds + longer.seconds)
    observe(run, after)
