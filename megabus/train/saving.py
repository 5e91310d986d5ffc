"""A run's checkpoints as the loop sees them: when one begins, what became of it, and the last one."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch.distributed as dist

from megabus.checkpoint.save import Save
from megabus.checkpoint.state import SavedState
from megabus.checkpoint.store import folder_of
from megabus.errors import UserError
from megabus.parallel.fragments import KINDS
from megabus.train.resume import data_order
from megabus.train.run import Run


def save(run: Run, last: bool = False) -> None:
    """Begin to save the run as it is now, after the save before has ended. Collective, at a step boundary.

    Not in the middle of a series of non-finite steps, unless it is the run's last save: their cause may lie in the
    weights, and the run must find an older checkpoint to return to.
    """
    collect(run)
    if run.saved_step == run.progress.step or (run.progress.nonfinite_in_a_row and not last):
        return
    run.saver.start(_state(run), run.engine.placement, run.engine.read())
    run.saved_step = run.progress.step
    run.watchdog.beat()


def collect(run: Run) -> None:
    """Wait for the save that is going on, if there is one, and tell of it. Collective."""
    ended = run.saver.wait()
    if ended is None:
        return
    if ended.error is not None:
        run.saved_step = None
        if run.config.checkpoint.on_error == "stop":
            raise ended.error
        _warn(run, f"{ended.error}; training goes on")
    if run.metrics is not None:
        _log(run, ended)


def told_of_full_disk(run: Run) -> None:
    """metrics.jsonl cannot be written. Its rows wait in memory; told once, or the end of the run as configured."""
    path, error = Path(run.config.run_dir) / "metrics.jsonl", run.metrics.file.error if run.metrics else None
    if run.config.checkpoint.on_error == "stop":
        raise UserError("log", path, f"cannot be written ({error})", "make room")
    if not run.told:
        _warn(run, f"{path} cannot be written ({error}): its rows wait in memory")
    run.told = True


def finish(run: Run) -> Path:
    """Save the last state, wait for it, and close everything; the newest checkpoint. Collective."""
    save(run, last=True)
    last = run.saver.wait()
    if last is not None and run.metrics is not None:
        _log(run, last)
    if run.metrics is not None:
        run.metrics.close()
    run.engine.close()
    if last is not None and last.error is not None:
        raise last.error
    if dist.get_rank() == 0:
        run.requests.obeyed()
    return folder_of(run.saver.root, run.progress.step)


def _state(run: Run) -> SavedState:
    optimizer_step = run.engine.optimizer_step
    return SavedState(
        progress=copy.deepcopy(run.progress),  # the run goes on while this is written
        stage=run.stage.index,
        model=run.stage.model,
        layout=run.stage.layout,
        optimizer_step=optimizer_step,
        kinds=KINDS if optimizer_step else ("weight",),
        monitor=run.monitor.state_dict(),
        config=run.config.model_dump(mode="json"),
        data=data_order(run.corpora.sources),
    )


def _log(run: Run, ended: Save) -> None:
    assert run.metrics is not None
    row = {"step": ended.step, "stall_s": ended.stall_s, "write_s": ended.write_s, "bytes": ended.bytes}
    run.metrics.write("save", row | {"error": None if ended.error is None else str(ended.error)})


def _warn(run: Run, text: str) -> None:
    if run.metrics is not None:
        print(f"warning: {text}", file=sys.stderr, flush=True)
