"""From the rows of a run to curves of a few hundred points: what a panel shows and how it is thinned."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from megabus.report.history import MetricsRow, XAxis, numbers, places

POINTS = 400  # of a curve
SMOOTH = 100  # what is smoothed is averaged over a hundredth of the rows before and after
TIMED = (
    "start",
    "step",
    "eval",
    "growth",
    "phase",
    "gains",
    "memory",
    "evaluation",
    "tasks",
)  # rows that have a place on every axis

Keep = Literal["mean", "max", "last"]  # of the rows that become one point
Shape = Literal["line", "thin", "dashed", "band", "range"]
Curve = dict[str, list[float | None]]


@dataclass(frozen=True)
class Drawn:
    """A run, thinned. places: by event and axis, where the points of all its curves are; curves: by panel and line."""

    places: dict[str, dict[str, list[float | None]]]
    curves: list[list[Curve | None]]


@dataclass(frozen=True)
class Line:
    """One line of a panel. event, key: where its numbers are (`a|b` is nested); scale: to the panel's unit.

    to: the key of a band's upper edge. smooth: a moving average.
    """

    event: str
    key: str
    label: str
    shape: Shape = "line"
    keep: Keep = "mean"
    scale: float = 1.0
    smooth: bool = False
    to: str = ""


@dataclass(frozen=True)
class Panel:
    """A diagram. unit: of its vertical axis; log: whether that is logarithmic; remedy: why there may be nothing; about:
    a sentence for who does not know what it shows."""

    key: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    log: bool = False
    remedy: str = "this run has not logged it"
    about: str = ""

    @property
    def has_two_colours(self) -> bool:
        """Whether training and validation, both in the panel, have a colour each where there is one run."""
        return {"step", "eval"} <= {line.event for line in self.lines}


_GIB = 1 / 2**30
PANELS = (
    Panel(
        "loss",
        "Loss",
        "nats per token",
        (
            Line("step", "loss", "training, each step", "range"),
            Line("step", "loss", "training, smoothed", "thin", smooth=True),
            Line("eval", "loss", "validation"),
        ),
    ),
    Panel(
        "bits",
        "Bits per byte",
        "bits per byte of text",
        (Line("eval", "bits_per_byte", "validation"),),
        remedy="the validation token files do not say of how many bytes of text they are: preprocess it again",
    ),
    Panel(
        "kappa",
        "κ: share of the predicted improvement",
        "share",
        (Line("eval", "kappa_progress", "reached"), Line("eval", "kappa", "κ, at which it grows", "dashed", "last")),
        remedy="κ predicts nothing yet, or the run never asked it",
    ),
    Panel(
        "target",
        "κ: what the size is predicted to reach",
        "nats per token",
        (
            Line("eval", "kappa_loss", "validation"),
            Line("eval", "kappa_target", "target, at which it grows", "dashed"),
            Line("eval", "kappa_mp", "predicted final loss", "thin"),
        ),
        remedy="κ predicts nothing yet, or the run never asked it",
    ),
    Panel("speed", "Throughput", "tokens/s", (Line("step", "tokens_per_s", "all ranks"),)),
    Panel("speed_rank", "Throughput of a rank", "tokens/s", (Line("step", "tokens_per_s_per_gpu", "a rank"),)),
    Panel(
        "mfu",
        "Model FLOPs utilisation (MFU)",
        "share of peak",
        (Line("step", "mfu", "MFU"),),
        remedy="the device's peak is not known: set log.peak_tflops",
    ),
    Panel(
        "memory",
        "Peak memory of a rank",
        "GiB",
        (
            Line("memory", "max_bytes", "the rank with most", keep="max", scale=_GIB),
            Line("memory", "mean_bytes", "mean of ranks", "dashed", scale=_GIB),
        ),
    ),
    Panel(
        "unit",
        "Error of unit rows, largest",
        "| |row| - 1 |",
        (Line("step", "unit_error", "masters", keep="max"),),
        log=True,
        remedy="model.kind gpt has no unit rows, or log.unit_norm_every is larger than the run",
    ),
    Panel("lr", "Learning rate", "", (Line("step", "lr", "base rate", keep="last"),)),
    Panel(
        "grad",
        "Gradient norm, before clipping",
        "",
        (Line("step", "grad_norm", "each step", "range"), Line("step", "grad_norm", "smoothed", smooth=True)),
        log=True,
    ),
)


def mean_panels(runs: Sequence[Sequence[MetricsRow]]) -> list[Panel]:
    """A panel of the losses of running means of the weights, with a line for every decay that any run has logged."""
    logged = (row.get("ema") for rows in runs for row in rows if row["event"] == "eval")
    decays = dict.fromkeys(decay for means in logged if isinstance(means, dict) for decay in means)
    if not decays:
        return []
    lines = [Line("eval", f"ema|{decay}", f"mean with decay {decay}") for decay in decays]
    return [
        Panel(
            "ema",
            "Loss of running means of the weights (EMA)",
            "nats per token",
            (Line("eval", "loss", "the weights themselves", "dashed"), *lines),
            about="Validation on the same tokens as the loss.",
        )
    ]


def gain_panels(runs: Sequence[Sequence[MetricsRow]]) -> list[Panel]:
    """A panel for every kind of gain that any of the runs has logged, in their order."""
    gains = (row for rows in runs for row in rows if row["event"] == "gains")
    kinds = dict.fromkeys(kind for row in gains for kind, value in row.items() if isinstance(value, dict))
    return [
        Panel(
            f"gain:{kind}",
            f"Gain {kind}",
            "effective value",
            (
                Line("gains", f"{kind}|p0", "least to largest", "band", to=f"{kind}|p100"),
                Line("gains", f"{kind}|p5", "5% to 95%", "band", to=f"{kind}|p95"),
                Line("gains", f"{kind}|p50", "median"),
            ),
            about="A learned factor, as it acts: how it lies over all layers and entries.",
        )
        for kind in kinds
    ]


class Tracks:
    """A run's rows as columns of numbers, made when asked for. Raises `UserError` for what is no number."""

    def __init__(self, rows: Sequence[MetricsRow], source: object) -> None:
        self._source = source
        self._rows: dict[str, list[MetricsRow]] = {event: [] for event in TIMED}
        timed = [row for row in rows if row["event"] in TIMED]
        self._at: dict[str, dict[str, np.ndarray]] = {event: {} for event in TIMED}
        for key in ("step", "tokens", "flops"):
            self._numbers(timed, key, required=True)
        for key in ("tokens_per_s", "stall_s"):
            self._numbers(timed, key)
        timed.sort(key=lambda row: row["step"])  # scores of tasks come when they are there, and lie where they are of
        for row in timed:
            self._rows[row["event"]].append(row)
        event_of = np.array([row["event"] for row in timed], dtype=object)
        for x in get_args(XAxis):
            everywhere = np.array(places(timed, x), dtype=float)
            for event in TIMED:
                self._at[event][x] = everywhere[event_of == event]
            self._at.setdefault("all", {})[x] = everywhere
        self._at["all"]["step"] = np.array([row["step"] for row in timed], dtype=float)

    def rows(self, event: str) -> list[MetricsRow]:
        return self._rows[event]

    def at(self, event: str, x: XAxis) -> np.ndarray:
        """Places of the rows of a kind: (rows,)."""
        return self._at[event][x]

    def place(self, row: MetricsRow, x: XAxis) -> float:
        """Where a row lies that has perhaps no more than its step, or was taken back."""
        steps = self._at["all"]["step"]
        return float(np.interp(row["step"], steps, self._at["all"][x])) if len(steps) else 0.0

    def column(self, event: str, key: str) -> np.ndarray:
        """(rows,); NaN where a row has none."""
        return self._numbers(self._rows[event], key)

    def _numbers(self, rows: Sequence[MetricsRow], key: str, required: bool = False) -> np.ndarray:
        return np.array(numbers(rows, key, self._source, required), dtype=float)  # None becomes NaN


def drawn(tracks: Tracks, panels: Sequence[Panel]) -> Drawn:
    """All curves of a run."""
    events = dict.fromkeys(line.event for panel in panels for line in panel.lines)
    ends = {event: [stop - 1 for _, stop in _parts(len(tracks.rows(event)))] for event in events}
    at = {event: {x: _short(tracks.at(event, x)[ends[event]]) for x in get_args(XAxis)} for event in events}
    return Drawn(at, [[_curve(tracks, line) for line in panel.lines] for panel in panels])


def _curve(tracks: Tracks, line: Line) -> Curve | None:
    """The thinned line: its `y` (of bands `low` and `high`); None where there is no number."""
    y = tracks.column(line.event, line.key) * line.scale
    if not np.isfinite(y).any():
        return None
    parts = list(_parts(len(y)))
    ends = [stop - 1 for _, stop in parts]
    if line.shape == "band" or (line.shape == "range" and len(parts) < len(y)):
        upper = tracks.column(line.event, line.to) * line.scale if line.to else y
        return {"low": _short(_reduced(y, parts, np.min)), "high": _short(_reduced(upper, parts, np.max))}
    if line.smooth:
        return {"y": _short(moving_average(y, max(1, len(y) // SMOOTH))[ends])}
    return {"y": _short(_reduced(y, parts, _KEEP[line.keep]))}


_KEEP: dict[Keep, Any] = {"mean": np.mean, "max": np.max, "last": lambda part: part[-1]}


def _parts(n: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) of each point: at most `POINTS` of them, the last row being the last of one."""
    points = min(n, POINTS)
    for i in range(points):
        yield i * n // points, (i + 1) * n // points


def _reduced(y: np.ndarray, parts: Sequence[tuple[int, int]], reduce: Any) -> np.ndarray:
    finite = (y[start:stop][np.isfinite(y[start:stop])] for start, stop in parts)
    return np.array([reduce(part) if len(part) else math.nan for part in finite])


def moving_average(y: np.ndarray, half: int) -> np.ndarray:
    """Mean of the finite values from `half` before to `half` after each one; NaN where there is none."""
    good = np.isfinite(y)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, y, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    low = np.maximum(np.arange(len(y)) - half, 0)
    high = np.minimum(np.arange(len(y)) + half + 1, len(y))
    n = counts[high] - counts[low]
    return np.where(n > 0, (sums[high] - sums[low]) / np.maximum(n, 1), math.nan)


def _short(values: np.ndarray) -> list[float | None]:
    """Six digits: a page of a long run stays small."""
    return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]
