"""What a growth costs: its stall in steps' time, and beside saving, converting and starting anew.

The figures are a run's own, from its metrics: `launcher/train.py` is started as a user starts it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from benchmarks.arms import Timing
from benchmarks.comparisons import Comparison, compare
from benchmarks.live_rows import live_rows
from megabus.engine.startup import on_gpu

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "configs/demo.yaml"
# About the size of configs/ngpt_64m.yaml, on the way to it.
LARGE: dict[str, Any] = {
    "model": {
        "kind": "ngpt", "vocab_size": 32_000, "d_model": 384, "n_layers": 6, "n_heads": 6, "head_dim": 64, "d_ff": 1024
    },
    "layout": {"tp": 1, "pp": 1},
    "train": {"seq_len": 256, "micro_batch_size": 1, "global_batch_size": 4},
    "grown": {"d_model": 512, "n_heads": 8, "d_ff": 1408, "n_layers": 8, "layout": {"tp": 2, "pp": 1}},
    "steps": 6,  # before the growth and after it
}  # fmt: skip


def demo_case() -> dict[str, Any]:
    """The demo's first growth."""
    tree = yaml.safe_load(DEMO.read_text())
    train = {key: value for key, value in tree["train"].items() if not key.startswith("max_")}
    stage = tree["growth"]["stages"][0]
    grown = {"layout": tree["layout"]} | {key: stage[key] for key in stage if key not in ("lr", "max_tokens")}
    return {"model": tree["model"], "layout": tree["layout"], "train": train, "grown": grown, "steps": 20}


def growths(rounds: int, small: bool) -> list[Comparison]:
    """The demo's first growth on 4 ranks, and a larger one on 2 with a new layout; on a GPU each on 1 rank."""
    rows = []
    cases = [("demo", demo_case(), 4), ("35M to 58M", LARGE, 2)]
    for name, case, world in cases[:1] if small else cases:
        if on_gpu():
            world = 1
            case = case | {"layout": {}, "grown": {**case["grown"], "layout": {}}}
        with tempfile.TemporaryDirectory() as folder:
            found = [_round(Path(folder) / str(turn), case, world) for turn in range(min(rounds, 2))]
        what = f"growth, {name}, {world} ranks"
        moved, first, after, other = (Timing([one[i] for one in found], 0) for i in range(4))
        # What the first step has to warm up again counts as part of the stall.
        pairs = zip(moved.seconds, first.seconds, after.seconds, strict=True)
        stall = Timing([move + max(0.0, begin - usual) for move, begin, usual in pairs], 0)
        rows.append(compare(what, "redistribution and rebuilding", "a step after it", moved, after, "<= 2"))
        rows.append(compare(what, "first step after it", "steps after that", first, after, "<= 1.2"))
        rows.append(compare(what, "stall: both", "save, convert, start, load", stall, other, "<= 0.1"))
    return rows


def _round(folder: Path, case: dict[str, Any], world: int) -> tuple[float, float, float, float]:
    """Seconds: redistribution and rebuilding, the first step after it, a later one, and the other way."""
    folder.mkdir(parents=True)
    write_tokens(folder / "tokens", case["model"]["vocab_size"])
    batch = case["train"]["seq_len"] * case["train"]["global_batch_size"]
    live = run_config(folder, "live", case, 2 * case["steps"])
    live["growth"] = {"moments": "grow", "max_tokens": case["steps"] * batch, "stages": [case["grown"]]}
    rows = list(_train(folder, live, world))
    growth = next(i for i, row in enumerate(rows) if row["event"] == "growth")
    after = [_seconds(row, batch) for row in rows[growth:] if row["event"] == "step"]
    return rows[growth]["stall_s"], after[0], median(after[1:]), _the_other_way(folder, case, world)


def _the_other_way(folder: Path, case: dict[str, Any], world: int) -> float:
    """Seconds to save, grow on the disk, start the ranks again and load."""
    small = run_config(folder, "small", case, case["steps"])
    saves = [row for row in _train(folder, small, world) if row["event"] == "save"]
    seconds = saves[-1]["stall_s"]  # at the end of a run, until it is written
    sizes = {key: value for key, value in case["grown"].items() if key != "layout"}
    begun = time.perf_counter()
    module, paths = "benchmarks.growth_stall", [str(folder / "small"), str(folder / "grown")]
    grow = [sys.executable, "-m", module, *paths, json.dumps(sizes)]
    threads = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}  # it may use all cores
    subprocess.run(grow, check=True, cwd=ROOT, env=threads)
    seconds += time.perf_counter() - begun
    large = run_config(folder, "large", case, 2) | {
        "layout": case["grown"]["layout"],
        "init_from": str(folder / "grown"),
    }
    large["model"] = case["model"] | sizes
    begun, loaded = time.perf_counter(), 0.0
    for row in _train(folder, large, world):  # to its end, lest it disturb what is measured next
        if row["event"] == "start":  # the ranks are there, with their weights
            loaded = time.perf_counter() - begun
    return seconds + loaded


def run_config(folder: Path, name: str, case: dict[str, Any], steps: int) -> dict[str, Any]:
    tokens = str(folder / "tokens")
    return {
        "run_dir": str(folder / name),
        "model": dict(case["model"]),
        "layout": case["layout"],
        "train": case["train"] | {"max_steps": steps},
        "optimizer": {"lr": 1e-3},
        "data": {"train": tokens, "valid": tokens},
        "eval": {"every": 10 * steps, "tokens": 4 * case["train"]["seq_len"] * case["train"]["global_batch_size"]},
        "checkpoint": {"every": 10 * steps},
    }


def _seconds(step: dict[str, Any], tokens: int) -> float:
    return tokens / step["tokens_per_s"]


def _train(folder: Path, config: dict[str, Any], world: int) -> Iterator[dict[str, Any]]:
    """The rows of a run's metrics, each as soon as it is there."""
    path = folder / (Path(config["run_dir"]).name + ".yaml")
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += ["launcher/train.py", "--config", str(path)]
    log = path.with_suffix(".log")
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out)
    yield from live_rows(config["run_dir"], lambda: process.poll() is not None, 0.005)
    if process.returncode:
        raise RuntimeError(f"{config['run_dir']} failed:\n{log.read_text()[-2000:]}")


def write_tokens(prefix: Path, vocab_size: int, count: int = 1 << 20) -> None:
    from megabus.data.indexed import IndexedWriter, dtype_for_vocab

    dtype = dtype_for_vocab(vocab_size)
    with IndexedWriter(str(prefix), dtype) as writer:
        writer.append(np.random.default_rng(0).integers(0, vocab_size, count).astype(dtype))


def grow_on_disk(run_dir: Path, out: Path, sizes: dict[str, int]) -> None:
    """A run's newest checkpoint, with its model grown by the same function that grows a live one."""
    import megabus
    from megabus.checkpoint.load import checkpoint_at, load_weights
    from megabus.checkpoint.state import Progress, SavedState
    from megabus.checkpoint.store import checkpoints_of
    from megabus.config import Layout
    from megabus.convert.checkpoint import write_checkpoint

    folder = checkpoint_at(run_dir)
    model, state = load_weights(folder)
    larger = model.grown(**sizes)
    grown = megabus.grow_state(state, model, larger, seed=0)

    class Grown:
        tokenizer: Path | None = None
        state = SavedState(Progress(), 0, larger, Layout(1, 1, 1), 0, ("weight",), {}, {}, {})

        def read(self, kind: str, name: str, start: int, stop: int) -> Any:
            return grown[name].reshape(-1)[start:stop]

    write_checkpoint(Grown(), checkpoints_of(out), Layout(1, 1, 1))


if __name__ == "__main__":
    grow_on_disk(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
