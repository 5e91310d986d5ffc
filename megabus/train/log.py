"""The lines that people read while a run goes on."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from megabus.checkpoint.store import folder_of
from megabus.config import Stage
from megabus.config.phases import KEYS
from megabus.config.section import in_line
from megabus.errors import say
from megabus.kappa.monitor import KappaView, bar
from megabus.table import clock, visible
from megabus.train.callbacks import Callback, Row
from megabus.train.spikes import Level, broken

if TYPE_CHECKING:
    from megabus.train.run import Run

_NAMES = {"loss": "loss", "grad_norm": "|g|"}  # as the lines have them
Pace = deque[tuple[float, float]]  # (clock in seconds, share of the budget) after each of the last steps


class Log(Callback):
    """Rank 0's."""

    def __init__(self) -> None:
        self.pace: Pace = deque(maxlen=20)
        self._last_logged: tuple[int, float] | None = None  # step and validation loss of the last line that had one

    def on_row(self, run: Run, row: Row) -> None:
        if row["event"] in ("growth", "resume", "phase"):  # what came before says nothing of what comes
            self.pace.clear()
        if row["event"] == "start":
            first = f"{describe(run.stage)}, {row['sizes']['n_params']:,} parameters"
            say(f"{len(run.stages)} stage(s), first: {first}")
        elif row["event"] == "resume":
            folder = folder_of(run.saver.root, row["step"])
            say(f"resuming at step {row['step']}: {describe(run.stage)}, from {folder} ({row['saved_layout']})")
            if run.share >= 1:
                say("the run has reached its budget already: raise train.max_* to go on")
            for change in row["changes"]:
                say(f"changed since it was saved: {change}")
        elif row["event"] == "phase":
            samples = in_line({key: row[key] for key in row.get("changed") or KEYS})
            say(f"step {row['step']:>5} | PHASE at {row['share']:.0%}: {samples}")
        elif row["event"] == "sample":
            for sample in row["samples"]:
                lines = _printable(sample["prompt"] + visible(sample["text"])).split("\n")
                say(f"step {row['step']:>5} | sample: " + "\n           | ".join(lines))
        elif row["event"] == "evaluation":
            for name, loss in row["loss"].items():
                bits = row["bits_per_byte"][name]
                text = f"loss {loss:.4f}" + (f", {bits:.4f} bits/byte" if bits else "")
                say(f"step {row['step']:>5} | {name} ({row['when']}): {text}")
        elif row["event"] == "tasks":
            text = ", ".join(f"{name} {value:.4f}" for name, value in row.get("scores", {}).items())
            say(f"step {row['step']:>5} | tasks ({row['when']}): {text or 'failed, ' + row['error']}")
        elif row["event"] == "profile":
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
            say(
                f"step {row['step']:>5} | profile of steps {row['first']} to {row['last']} in {row['folder']}: {shares}"
            )
        super().on_row(run, row)

    def on_step(self, run: Run, row: Row) -> None:
        if row["event"] == "skip":
            what = "no update"
            if "loss_limit" in row:
                over = broken(row["loss"], row["grad_norm"], Level(row["loss_limit"], row["grad_norm_limit"]))
                limits = (f"{_NAMES[key]} above {most:.4g}" for key, (_, most) in over.items())
                what = f"no update, a spike: {' and '.join(limits)}"
            say(f"step {row['step']:>5} | loss {row['loss']:.4f} |g| {row['grad_norm']:.4g}: {what}")
            return
        self.pace.append((time.monotonic(), run.share))
        if row["step"] % run.config.log.every == 0 or run.share >= 1:
            say(step_line(row, run.stage, run.view if run.can_grow else None, seconds_left(self.pace)))

    def on_eval(self, run: Run, row: Row) -> None:
        if (row["step"], row["loss"]) != self._last_logged:
            self._last_logged = row["step"], row["loss"]
            bits = row["bits_per_byte"]
            say(
                f"step {row['step']:>5} | validation loss {row['loss']:.4f}"
                + (f", {bits:.4f} bits/byte" if bits else "")
            )
        if "ema" in row:
            means = ", ".join(f"{loss:.4f} with decay {decay}" for decay, loss in row["ema"].items())
            say(f"step {row['step']:>5} | validation loss of running means: {means}")
        if "why" in row:
            say(f"step {row['step']:>5} | {row['why']}")

    def on_growth(self, run: Run, row: Row) -> None:
        self._last_logged = row["step"], row["loss_after"]
        say(
            f"step {row['step']:>5} | GROWTH ({row['reason']}) {describe(run.stages[row['from_stage']])} -> "
            f"{describe(run.stage)} | loss {row['loss_before']:.6f} -> {row['loss_after']:.6f} | "
            f"{row['stall_s']:.1f} s, {row['bytes_sent'] / 2**20:.1f} MiB sent"
        )


def _printable(text: str) -> str:
    """What a terminal would obey is escaped, but for new lines."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def seconds_left(pace: Pace) -> float | None:
    """None before there are two steps to go by, since the start or the last growth; a second at least while there is a
    step to go, since none left would read as the end."""
    (first, low), (last, high) = pace[0], pace[-1]
    if high >= 1:
        return 0.0
    return max(1.0, (1 - high) * (last - first) / (high - low)) if high > low else None


def describe(stage: Stage) -> str:
    model = stage.model
    return f"d{model.d_model} L{model.n_layers} H{model.n_heads} ff{model.d_ff} {stage.layout}"


def step_line(row: Row, stage: Stage, view: KappaView | None, eta_s: float | None) -> str:
    """eta_s: seconds left, if that is known."""
    parts = [
        f"step {row['step']:>5}",
        describe(stage),
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"|g| {row['grad_norm']:.2f}",
        f"{row['tokens_per_s']:,.0f} tok/s ({row['tokens_per_s_per_gpu']:,.0f}/rank)",
    ]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if view is not None and view.progress is not None:
        parts.append(bar(view.progress, view.kappa))
    parts.append(f"{row['share']:.0%} done" + ("" if eta_s is None else f", {clock(eta_s)} left"))
    return " | ".join(parts)
