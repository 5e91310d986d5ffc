"""What a checkpoint costs: writing it beside a synced copy of its files, and what training waits for beside a step."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.arms import Timing
from benchmarks.comparisons import Comparison, compare
from benchmarks.growth_stall import LARGE
from benchmarks.training import config_of, shape, training_engine
from megabus.config import Layout
from megabus.testing.ranks import run_ranks
from megabus.testing.training import Training

if TYPE_CHECKING:  # it imports DeepSpeed
    from megabus.checkpoint.save import Save

ROOT = Path(__file__).resolve().parents[1]
ONE = Layout(1, 1, 1)


def saves(rounds: int, small: bool) -> list[Comparison]:
    """One rank, weights and moments of 35M parameters, 0.42 GB."""
    model = shape("ngpt", 32, 2) if small else LARGE["model"]
    config = config_of(model, ONE, 64 if small else 256, 4, 4)
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
        ((size, found),) = run_ranks(1, _measured, config, rounds, Path(folder), timeout=3600)
    timings = {what: Timing(seconds, 0) for what, seconds in found.items()}
    written, copied = (Timing([size / seconds for seconds in found[what]], 0) for what in ("save", "copy"))
    what = f"checkpoint of {size / 1e6:,.0f} MB"
    return [
        compare(what, "written, hashed, synced", "its files copied, synced", written, copied, ">= 0.8", "B/s"),
        compare(what, "stall of training", "a step", timings["stall"], timings["step"], "<= 0.05"),
    ]


def _measured(config: Training, rounds: int, folder: Path) -> tuple[int, dict[str, list[float]]]:
    """Bytes of a checkpoint, and seconds in each round; a round warms up."""
    from megabus.checkpoint.save import Saver

    step, engine = training_engine(config)
    savers = {name: Saver(folder / name, 1, None, name == "background", None) for name in ("save", "background")}
    for saver in savers.values():
        saver.prepare(engine.read)
    found: dict[str, list[float]] = {"step": [], "save": [], "copy": [], "stall": []}
    size = 0
    for turn in range(1, rounds + 2):
        for saver in savers.values():  # that it removes the one before is no part of writing one
            shutil.rmtree(saver.root, ignore_errors=True)
        found["step"].append(_seconds(step))
        _begin(savers["save"], engine, turn)
        found["save"].append(_written(savers["save"].wait()))
        size, copied = _copied(folder / "save" / f"step-{turn:08d}", folder / "copy")
        found["copy"].append(copied)
        found["stall"].append(_seconds(lambda turn=turn: _begin(savers["background"], engine, turn)))
        while not savers["background"].ended:
            step()
        _written(savers["background"].wait())
    return size, {what: seconds[1:] for what, seconds in found.items()}


def _begin(saver: Any, engine: Any, step: int) -> None:
    from megabus.checkpoint.state import Progress, SavedState
    from megabus.parallel.fragments import KINDS

    stage = engine.stage
    state = SavedState(Progress(step=step), 0, stage.model, stage.layout, engine.optimizer_step, KINDS, {}, {}, {})
    saver.start(state, engine.placement, engine.read())


def _written(save: Save | None) -> float:
    """Seconds that the writing took."""
    assert save is not None
    if save.error is not None:
        raise save.error
    return save.write_s


def _copied(source: Path, target: Path) -> tuple[int, float]:
    shutil.rmtree(target, ignore_errors=True)
    begun = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with path.open() as file:
            os.fsync(file.fileno())
    return sum(path.stat().st_size for path in target.iterdir()), time.perf_counter() - begun


def _seconds(job: Any) -> float:
    begun = time.perf_counter()
    job()
    return time.perf_counter() - begun
