"""A run: what it is made of, how it starts or goes on, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megabus.checkpoint.contents import Found
from megabus.checkpoint.restore import find_checkpoint, restore
from megabus.checkpoint.save import Saver
from megabus.checkpoint.state import Progress
from megabus.checkpoint.store import checkpoints_of, complete, prune
from megabus.config import RunConfig, Stage
from megabus.config.phases import KEYS
from megabus.data.batches import TokenSource
from megabus.data.order import Deal, align_up, slots
from megabus.data.sources import Sources
from megabus.engine.engine import Engine
from megabus.errors import UserError, warn
from megabus.growth.transition import stage_engine
from megabus.kappa.marginal import Ahead
from megabus.kappa.monitor import KappaMonitor, KappaView
from megabus.kappa.predictors import StageSpan
from megabus.model.budget import spent_share
from megabus.model.cost import count_parameters, counted_sizes, flops_per_token
from megabus.model.params import UNIT_ERROR
from megabus.parallel.agree import agreement, rank_0_says, rank_0_tells
from megabus.preflight.flight import preflight
from megabus.report.history import NOT_FINITE, SPIKE
from megabus.train.before import Notes, check_before
from megabus.train.callbacks import Callback, Guarded, Row, check_alike, checked, guarded
from megabus.train.corpora import Corpora
from megabus.train.environment import environment
from megabus.train.evaluations import Evaluations
from megabus.train.horizon import at_horizon
from megabus.train.log import Log
from megabus.train.metrics import Metrics
from megabus.train.profile import Profile
from megabus.train.resume import (
    check_begins,
    check_continues,
    check_layouts,
    check_taken_over,
    check_tokenizer,
    data_order,
    tokenizer_of,
)
from megabus.train.run_dir import RunLock, check_shared, open_metrics
from megabus.train.samples import Samples
from megabus.train.settled import settle_kernels
from megabus.train.spikes import Spikes
from megabus.train.stop import StopRequests
from megabus.train.watchdog import Watchdog, watched

LAST_SAVE = 60.0  # seconds that a run which ends with an error waits for a save


@dataclass
class Run:
    """All that changes while a run goes on."""

    config: RunConfig
    stages: list[Stage]
    corpora: Corpora
    engine: Engine
    monitor: KappaMonitor  # every rank has one; rank 0's alone is fed and asked
    metrics: Metrics | None  # on rank 0, the first of the callbacks
    callbacks: Sequence[Callback]  # in the order in which they are told; what they end in is the reverse
    saver: Saver
    requests: StopRequests
    watchdog: Watchdog
    spikes: Spikes
    progress: Progress = field(default_factory=Progress)
    saved_step: int | None = None  # of the newest checkpoint that is written, or being written
    save_is_due: bool = False
    stopping: bool = False
    warned_unwritten: bool = False  # that the metrics cannot be written, until they can
    view: KappaView | None = None
    held: list[tuple[str, Row]] | None = None  # what a user's callback that is being called has told
    answers: int = 0  # of rows that such tell because of one another, how many are being told

    @property
    def is_rank_0(self) -> bool:
        return self.metrics is not None

    def tell(self, event: str, row: Row) -> None:
        """Tell all callbacks what has happened: `row` with the run's totals, a save's with those of the step that was
        saved. Every rank does. What a user's callback tells is told when the callback has returned on every rank."""
        if self.held is not None:
            self.held.append((event, checked(event, row, self.answers)))
            return
        totals = {} if event == "save" else self.totals
        for callback in self.callbacks:
            callback.on_row(self, {"event": event} | totals | row)

    @property
    def stage(self) -> Stage:
        return self.engine.stage

    @property
    def share(self) -> float:
        now = self.progress
        return spent_share(self.config.train, now.step, now.tokens, now.flops)

    @property
    def totals(self) -> dict[str, Any]:
        now = self.progress
        return {"step": now.step, "tokens": now.tokens, "flops": now.flops, "stage": self.stage.index}

    @property
    def step_flops(self) -> float:
        """Of one optimizer step in this stage."""
        return self.stage.tokens_per_step * flops_per_token(self.stage.model, self.stage.seq_len)

    def place(self) -> None:
        """Let the next step begin where samples of the stage's length may, dealt out by the stage's weights.

        These hold from the beginning of a chunk on: what is left of one that was begun waits for the next epoch.
        """
        now, source = self.progress, self.corpora.sources.train
        now.position, counts = align_up(now.position, self.stage.seq_len), slots(self.stage.weights)
        if not now.deals or counts != now.deals[-1].counts:
            start = align_up(now.position, source.chunk_len) // source.chunk_len if now.deals else 0
            now.deals = (*(deal for deal in now.deals if deal.start < start), Deal(start, counts))
            now.position = max(now.position, start * source.chunk_len)
        self.corpora.deal(now.deals)

    def mark(self) -> None:
        """From here on steps are of this stage."""
        self.progress.mark(self.engine.optimizer_step, self.stage.tokens_per_step, self.step_flops)

    @property
    def can_grow(self) -> bool:
        return self.stage.index + 1 < len(self.stages)


def start(
    config: RunConfig,
    passed: Sequence[Callback],
    requests: StopRequests,
    watchdog: Watchdog,
    lock: RunLock,
    held: ExitStack,
) -> Run:
    """Check everything that can be checked; then go on from the newest checkpoint, or build the first stage. What must
    not outlive the run goes into `held`. Raises `StoppedError` if asked to before anything is left in the run's
    directory."""
    judge, reserve = partial(_judge, config, passed), partial(_reserve, config, lock)
    stages, sources, (users, notes) = preflight(config, judge, reserve, watchdog.heartbeat, config.preflight.enabled)
    requests.check_start()
    stages = at_horizon(config, stages)
    corpora, root = Corpora(sources), checkpoints_of(config.run_dir)
    found = find_checkpoint(root, config.resume == "strict", watchdog.heartbeat)
    origin = None
    if config.init_from is not None and found is None:
        # Slow to import, and most runs begin with nothing.
        from megabus.convert.begin import begin, extended, origin_of, unread_tokenizer

        origin = origin_of(config.init_from, watchdog.heartbeat)
        check_begins(origin, stages[0], config.extend_vocabulary)
        with agreement():
            if why := unread_tokenizer(origin):
                remedy = "or leave it behind: begin from what megabus convert --to checkpoint --without-tokenizer makes"
                raise UserError("init_from", origin.folder, f"its tokenizer {why}", remedy)
            if config.extend_vocabulary and sources.tokenizer is not None:
                larger = extended(origin, sources.tokenizer, stages[0].model.vocab_size, watchdog.heartbeat)
                rank_0_says(f"init_from: {larger.made}")
                origin = larger
            else:
                check_tokenizer(origin, sources)
                check_taken_over(origin, config, stages[0])
    requests.check_start()
    changes: list[str] = []
    with agreement():
        check_layouts(config, found, dist.get_world_size())
        if found is not None:
            check_tokenizer(found, sources)
            changes = check_continues(found, config, stages, data_order(corpora.sources))
    config, other_form = settle_kernels(config, stages, found)
    changes += other_form
    lock.keep()
    with agreement():  # only once every rank is content: a refused run leaves nothing behind
        metrics = open_metrics(config, found) if dist.get_rank() == 0 else None
    if metrics is not None:
        held.callback(metrics.release)
    keep = config.checkpoint
    weights = found or origin
    tokenizer = config.data.tokenizer or (tokenizer_of(weights) if weights is not None else None)
    notes.tell()
    monitor = KappaMonitor(config.growth.trigger)
    saver = Saver(root, keep.keep_last, keep.keep_every, keep.asynchronous, tokenizer, watchdog.heartbeat)
    engine = _engine(config, stages, found)
    watchdog.heartbeat()
    machine = environment(engine.device)
    spikes = Spikes(config.faults.spikes, engine.device)
    # Who tells more of what it is told comes last: so all hear rows in the order that the metrics have.
    callbacks = [*([] if metrics is None else [metrics, Log()]), *users, *_looking(config, sources, held)]
    run = Run(config, stages, corpora, engine, monitor, metrics, callbacks, saver, requests, watchdog, spikes)
    if found is not None:
        go_on_from(run, found, {"reason": "start", "changes": changes, "environment": machine})
    else:
        if origin is not None:
            begin(origin, engine, watchdog.heartbeat)
            _tell_unit_error(engine)
        else:
            engine.write_initial(config.train.seed)
        run.place()
        run.mark()
        watch_stage(run)
        layout, sizes = str(run.stage.layout), counted_sizes(run.stage.model)
        run.tell("start", {"sizes": sizes, "layout": layout, "environment": machine})
    with agreement():
        if dist.get_rank() == 0:  # of a run that was killed before it could
            prune(root, keep.keep_last, keep.keep_every)
    watchdog.heartbeat()
    return run


def _looking(config: RunConfig, sources: Sources, held: ExitStack) -> list[Callback]:
    """What looks at the model while it trains, on all ranks; what of it must not outlive the run goes into `held`."""
    looking: list[Callback] = []
    if config.log.samples is not None and sources.tokenizer is not None:
        looking.append(Samples(config.log.samples, sources.tokenizer, config.train.seed))
    if config.eval.extra.data or config.eval.extra.tasks:
        evaluations = Evaluations(config)
        held.callback(evaluations.release)
        looking.append(evaluations)
    if config.log.profile is not None:
        profile = Profile(config.log.profile, config.run_dir)
        held.callback(profile.release)
        looking.append(profile)
    return looking


def _tell_unit_error(engine: Engine) -> None:
    """Of weights that a run begins with. Collective."""
    error = engine.unit_error()
    if error is not None and error > UNIT_ERROR:
        rank_0_says(f"init_from: rows are not unit vectors, by up to {error:.2g}; the first step makes them so", warn)


def check_only(config: RunConfig) -> None:
    """The preflight of a run that is not started: nothing of the trainer's own is left behind. Collective.

    Users' callbacks are made, for only that shows whether they can be; what making one writes stays.
    """
    lock = RunLock(Path(config.run_dir))
    try:
        with watched(config.faults.hang_timeout, dist.get_rank()) as watchdog:
            judge, reserve = partial(_judge, config, ()), partial(_reserve, config, lock)
            *_, (_, notes) = preflight(config, judge, reserve, watchdog.heartbeat, full=True, measured=True)
            notes.tell()
    finally:
        lock.release()


def _judge(config: RunConfig, passed: Sequence[Callback], stages: list[Stage]) -> tuple[list[Guarded], Notes]:
    """Users' callbacks, made, and what there is to be told of the run; raises `UserError` on all ranks for what cannot
    be. Collective."""
    with agreement():
        users = guarded(config, passed)
    check_alike(users)
    return users, check_before(config, stages)


def _reserve(config: RunConfig, lock: RunLock) -> None:
    """Make the run_dir this run's; raises `UserError` on all ranks if it cannot be. Collective."""
    with agreement():
        if dist.get_rank() == 0:
            lock.acquire()
            if config.resume == "never" and complete(checkpoints_of(config.run_dir)):
                raise UserError("run_dir", config.run_dir, "holds a run", "choose another, or resume=auto")
    check_shared(Path(config.run_dir))


def _engine(config: RunConfig, stages: list[Stage], found: Found | None) -> Engine:
    """Of the stage, and of the phase of it, that a run begins with or goes on in."""
    index, now = (0, Progress()) if found is None else (found.state.stage, found.state.progress)
    share = spent_share(config.train, now.step, now.tokens, now.flops)
    return stage_engine(config, stages[index].at(share), stages[index - 1] if index else None)


def _dealt(found: Found, source: TokenSource) -> tuple[Deal, ...]:
    """How a run has dealt out its corpora up to a checkpoint; nothing where it had another number of them, or chunks of
    another length, whose numbers say nothing of these."""
    now, data = found.state.progress, found.state.data["train"]
    if len(data["blend"]) != len(source.corpora) or data["chunk_len"] != source.chunk_len:
        return ()
    return now.deals or (Deal(0, tuple(data["blend"])),)


@contextmanager
def started(config: RunConfig, passed: Sequence[Callback], requests: StopRequests, watchdog: Watchdog) -> Iterator[Run]:
    """A run from `start` until the block ends. After an error a save that is going on may still become a checkpoint.
    However it ends, its process of tasks, its profiler and its run of wandb end with it."""
    lock = RunLock(Path(config.run_dir))
    with ExitStack() as held:
        held.callback(lock.release)  # last: who has the lock next finds nobody here
        run = start(config, passed, requests, watchdog, lock, held)
        try:
            yield run
        except UserError:
            run.saver.let_end(LAST_SAVE)
            raise


def go_on_from(run: Run, found: Found, why: dict[str, Any]) -> None:
    """Put the run, whose engine is of the checkpoint's stage, where the checkpoint was saved. Collective.

    why: what is written down of it: `reason`, `changes` (see `check_continues`), and with a start `environment`.
    """
    restore(found, run.engine, run.watchdog.heartbeat)
    now = run.progress = replace(found.state.progress, deals=_dealt(found, run.corpora.sources.train))
    dealt = now.deals
    run.place()
    assert now.since is not None, "weights without a run are refused before"
    changed = (now.position, run.stage.tokens_per_step, run.step_flops) != (
        found.state.progress.position,
        now.since.step_tokens,
        now.since.step_flops,
    )
    if changed:
        run.mark()
    others = changed or now.deals != dealt  # other samples by this configuration: what was before is no measure of them
    run.spikes.begin(() if others else found.state.recent)
    run.saved_step = now.step
    run.monitor.load_state_dict(found.state.monitor)
    if others:
        run.monitor.begin_anew()
    run.monitor.retarget(run_span(run))
    run.view = run.monitor.view(now.tokens, now.flops)
    layouts = {"layout": str(run.stage.layout), "saved_layout": str(found.state.layout)}
    run.tell("resume", layouts | {"sizes": counted_sizes(run.stage.model)} | why)
    if others:
        tell_phase(run, None)


def tell_phase(run: Run, before: Stage | None) -> None:
    """From here on steps take other samples. before: the stage as the last step knew it, where that is known."""
    samples = {key: getattr(run.stage, key) for key in KEYS} | {"weights": list(run.stage.weights)}
    row: Row = {"share": run.share, "position": run.progress.position} | samples
    if before is not None:
        row["changed"] = [key for key in KEYS if getattr(before, key) != getattr(run.stage, key)]
    run.tell("phase", row)


def roll_back(run: Run) -> None:
    """Return to the newest checkpoint, and pass over the data up to here. Collective."""
    failed, limit = run.progress, run.config.faults.max_rollbacks
    spike, (key, value, what) = run.spikes.stands_out, rank_0_tells(run.spikes.failure)
    problem = f"{what} at step {failed.step}, the last of {failed.nonfinite_in_a_row} such steps in a row"
    remedy = "lower optimizer.lr or look at the data of those steps"
    if spike:
        remedy += ", or raise faults.spikes.deviations or set faults.spikes.lasting to accept"
    if failed.rollbacks >= limit:
        raise UserError(key, value, f"{problem}, after {limit} return(s) to a checkpoint", remedy)
    found = find_checkpoint(run.saver.root, run.config.resume == "strict", run.watchdog.heartbeat)
    if found is None:
        raise UserError(key, value, f"{problem}, and there is no checkpoint to return to", remedy)
    run.engine.close()
    run.engine = _engine(run.config, run.stages, found)
    run.watchdog.heartbeat()
    go_on_from(run, found, {"reason": SPIKE if spike else NOT_FINITE, "changes": [], "from_step": failed.step})
    run.progress.position, run.progress.deals = failed.position, failed.deals
    run.place()
    run.progress.nonfinite, run.progress.spikes = failed.nonfinite, failed.spikes
    run.progress.rollbacks = failed.rollbacks + 1
    run.mark()


def watch_stage(run: Run) -> None:
    """Point the monitor at the stage that the run is in now."""
    run.monitor.start_stage(run_span(run))


def run_span(run: Run) -> StageSpan:
    span, now = span_of(run.stage, run.progress.tokens, run.progress.flops), run.progress
    if not run.can_grow:
        return replace(span, last=True)
    following, train = run.stages[run.stage.index + 1].at(run.share), run.config.train
    ends = [float(train.max_tokens)] if train.max_tokens else []
    if train.max_steps:
        ends.append(now.tokens + (train.max_steps - now.step) * following.tokens_per_step)
    per_token = flops_per_token(following.model, following.seq_len)
    ahead = Ahead(count_parameters(following.model), per_token, min(ends, default=None), train.max_flops)
    return replace(span, ahead=ahead)


def span_of(stage: Stage, tokens: int, flops: float) -> StageSpan:
    """What a monitor must know of a stage that begins at these run totals."""
    n_params = count_parameters(stage.model)
    return StageSpan(stage.index, n_params, stage.kappa, tokens, flops, stage.max_tokens, stage.max_flops)
