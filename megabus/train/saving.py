"""A run's checkpoints as the loop sees them: when one begins, what became of it, and the last one."""

from __future__ import annotations

import copy
from pathlib import Path

import torch.distributed as dist

from megabus.checkpoint.save import Save
from megabus.checkpoint.state import SavedState
from megabus.checkpoint.store import folder_of
from megabus.errors import UserError, warn
from megabus.parallel.agree import agreement
from megabus.parallel.fragments import KINDS
from megabus.train.callbacks import Guarded
from megabus.train.resume import data_order
from megabus.train.run import Run


def save(run: Run) -> None:
    """Begin to save the run as it is now, after the save before has ended. Collective, at a step boundary.

    Not in the middle of a series of non-finite steps: their cause may lie in the weights, and the run must find an
    older checkpoint to return to. The save stays due.
    """
    collect(run)
    if run.progress.nonfinite_in_a_row or run.saved_step == run.progress.step:
        return
    _begin(run)


def cannot_be_saved(run: Run) -> bool:
    """Whether a run that is to stop goes on until it can be saved, the same on all ranks: for `faults.max_skips` steps
    at most, amid a series of steps without an update, for the run may have to return to the checkpoint before it.
    Where there is none it is saved as it is."""
    return run.progress.nonfinite_in_a_row > 0 and run.saved_step not in (None, run.progress.step)


def _begin(run: Run) -> None:
    run.watchdog.heartbeat(f"the save after step {run.progress.step}")
    run.saver.start(_state(run), run.engine.placement, run.engine.read())
    run.saved_step, run.save_is_due = run.progress.step, False
    run.watchdog.heartbeat()


def collect(run: Run) -> Save | None:
    """Wait for the save that is going on, if there is one, and write down what became of it. Collective."""
    ended = run.saver.wait()
    if ended is None:
        return None
    run.watchdog.heartbeat()
    row = {"step": ended.step, "stall_s": ended.stall_s, "write_s": ended.write_s, "bytes": ended.bytes}
    run.tell("save", row | {"error": None if ended.error is None else str(ended.error)})
    if ended.error is None:
        run.progress.rollbacks = 0  # there is a checkpoint beyond the trouble
    else:
        run.saved_step = None
        if run.config.checkpoint.on_error == "stop":
            raise ended.error
        if run.metrics is not None and run.share < 1:
            warn(f"{ended.error}; training goes on")
    return ended


def warn_unwritten(run: Run) -> None:
    """Metrics cannot be written. Told once an outage, or the end of the run as configured. Collective."""
    error = None if run.metrics is None else run.metrics.error
    path, message = Path(run.config.run_dir) / "metrics.jsonl", str(error) or type(error).__name__
    with agreement():
        if error is not None and run.config.checkpoint.on_error == "stop":
            raise UserError("log", path, f"cannot be written ({message})", "make room")
    if error is not None and not run.warned_unwritten:
        warn(f"{path} or what else is logged cannot be written ({message}): its rows wait in memory")
    run.warned_unwritten = True
    if run.metrics is not None:
        run.metrics.forget_lost()


def finish(run: Run) -> Path:
    """Save the last state, wait for it, and close everything; the newest checkpoint. Raises what a callback has ended
    the run with. Collective."""
    collect(run)
    if run.saved_step != run.progress.step:
        _begin(run)
    last = collect(run)
    close(run)
    if last is not None and last.error is not None:
        raise last.error
    if dist.get_rank() == 0:
        run.requests.obeyed()
    assert run.saved_step is not None
    folder = folder_of(run.saver.root, run.saved_step)
    raise_failure(run, folder if run.share >= 1 else None)
    return folder


def close(run: Run) -> None:
    """End what is open, with nothing saved. Whoever still tells something does it before those end that hear of it."""
    for callback in reversed(run.callbacks):
        callback.on_end(run)
    run.corpora.close()
    run.engine.close()


def raise_failure(run: Run, complete: Path | None = None) -> None:
    """Raise what a user's callback has ended the run with, the same on every rank, if one has. complete: the checkpoint
    of a run that has come to its end."""
    for callback in run.callbacks:
        if isinstance(callback, Guarded) and callback.failure is not None:
            callback.failure.complete = complete
            raise callback.failure


def _state(run: Run) -> SavedState:
    optimizer_step = run.engine.optimizer_step
    return SavedState(
        progress=copy.deepcopy(run.progress),  # the run goes on while this is written
        stage=run.stage.index,
        model=run.stage.model,
        layout=run.stage.layout,
        optimizer_step=optimizer_step,
        kinds=(*(KINDS if optimizer_step else KINDS[:1]), *run.engine.averages.kinds),
        monitor=run.monitor.state_dict(),
        config=run.config.model_dump(mode="json"),
        data=data_order(run.corpora.sources),
        recent=list(run.spikes.recent),
        averaged=dict(run.engine.averages.updates),
    )
