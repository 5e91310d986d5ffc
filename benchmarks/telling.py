"""What it costs that a run tells of its steps: the trainer's own step with nothing asked for, with a callback that does
nothing, and with nobody told."""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.arms import Arm, Step, in_turn
from benchmarks.comparisons import Comparison, compare_seconds
from benchmarks.growth_stall import write_tokens

OFF, OWN, NOBODY = "all of it off", "a callback that does nothing", "nobody is told"
MODEL: dict[str, Any] = {  # the demo's first size: steps so short that whatever is added to them shows
    "kind": "ngpt", "vocab_size": 1024, "d_model": 48, "n_layers": 2, "n_heads": 4, "head_dim": 16, "d_ff": 96
}  # fmt: skip


def telling(rounds: int, small: bool) -> list[Comparison]:
    """On one rank, where a step is shortest. The log has a line every 10 steps, as it is set."""
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder) / "tokens", MODEL["vocab_size"])
        timings = in_turn(
            [Arm(who, 1, trainer, (folder, who)) for who in (OFF, OWN, NOBODY)], rounds, 2 if small else 50
        )
    what = "trainer's step, 32 x 64 tokens, 1 rank"
    return [
        compare_seconds(what, OFF, NOBODY, timings, "<= 1.01"),
        compare_seconds(what, OWN, OFF, timings, "<= 1.01"),
    ]


def trainer(folder: str, who: str) -> Step:
    """A run that is made and stepped as the main loop does it."""
    from megabus.config import parse_config
    from megabus.train.callbacks import Callback
    from megabus.train.loop import agree_on_step_end, has_failed, train_step
    from megabus.train.run import start
    from megabus.train.run_dir import RunLock
    from megabus.train.stop import StopRequests
    from megabus.train.watchdog import Watchdog

    class Nothing(Callback):
        def on_step(self, run: Any, row: Any) -> None:
            pass

    run_dir, tokens = Path(folder) / who.replace(" ", "-"), str(Path(folder) / "tokens")
    config = parse_config(
        {
            "run_dir": str(run_dir),
            "model": MODEL,
            "train": {"seq_len": 64, "micro_batch_size": 32, "global_batch_size": 32, "max_steps": 10**6},
            "optimizer": {"lr": 1e-3},
            "data": {"train": tokens, "valid": tokens},
            "eval": {"tokens": 64},
            "preflight": {"enabled": False},
        }
    )
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115  the log's lines are made, and not shown
    own: list[Callback] = [Nothing()] if who == OWN else []
    hangs = 86_400.0  # arms that wait for their turn make no progress
    requests, watchdog, lock = StopRequests(run_dir, True), Watchdog(hangs, 0), RunLock(run_dir)
    run = start(config, own, requests, watchdog, lock, ExitStack())  # its process ends with it
    if who == NOBODY:
        run.callbacks = []

    def step() -> None:
        train_step(run)
        agree_on_step_end(run, has_failed(run))

    return step
